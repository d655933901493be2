"""Calls of a known kind on a GPU: compiled code that is called without Triton gives what the oracle does, wherever it runs."""

import pytest
import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends import kinds, whole
from attnsieve.backends.call import Call
from attnsieve.patterns import columns, diagonals, sink, window
from attnsieve.testing import assert_within_budget
from tests.gpu.test_triton import poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROW = [sink(2) | window(60), columns(0, 70, 129) | window(9), diagonals(0, 1, 131), window(300)]


def inputs(q_len, n=512, device="cuda"):
    shapes = ((4, q_len), (2, n), (2, n))
    return [torch.randn(1, heads, length, 64, device=device, dtype=torch.bfloat16) for heads, length in shapes]


def check(layout, q, k, v, **options):
    out, lse = attend(q, k, v, layout, backend="triton", return_lse=True, **options)
    spans = Spans.full(1, q.shape[2], k.shape[2], q.device)
    assert_within_budget(out, lse, Call(q, k, v, layout, spans, 0.125))


def code_of(layout):
    """Whether each launch of the remembered calls has code that is called without Triton."""
    runs = [known.again._run for known in kinds._kinds(layout).values()]
    launches = [value for run in runs for value in vars(run).values() if hasattr(value, "_code")]
    return [launch._code is not None for launch in launches]


@pytest.mark.parametrize("q_len", [512, 100, 1, 3])
def test_repeated_calls(q_len):
    layout = compile_layout(ROW, 512, "cuda")
    for _ in range(5):
        check(layout, *inputs(q_len))
    assert code_of(layout)
    assert all(code_of(layout))
    check(layout, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(q_len)))
    check(layout, *(torch.cat([x, x], dim=-1)[..., 1:65] for x in inputs(q_len)))


def test_a_text_that_grows():
    layout = compile_layout(ROW, 512, "cuda")
    for n in range(256, 300):
        check(layout, *inputs(1, n))
        check(layout, *inputs(1, n), spans=Spans.full(1, 1, n, "cuda"))
    assert all(code_of(layout))


@pytest.mark.parametrize("q_len", [512, 1])
@pytest.mark.parametrize("warm", [1, 4])
def test_repeated_calls_replay_in_a_graph(q_len, warm):
    layout = compile_layout(ROW, 512, "cuda")
    for _ in range(warm):
        check(layout, *inputs(q_len))
    q, k, v = inputs(q_len)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, layout, backend="triton", return_lse=True)
    # What is made while a graph is captured must not be used before it is replayed, and what it reads must not go.
    check(layout, *inputs(q_len))
    whole._spans.known.clear()
    kinds._kinds(layout).clear()
    poison()
    for _ in range(2):
        for x, new in zip((q, k, v), inputs(q_len), strict=True):
            x.copy_(new)
        graph.replay()
        assert_within_budget(out, lse, Call(q, k, v, layout, Spans.full(1, q_len, 512, "cuda"), 0.125))


def test_streams_of_their_own():
    layout = compile_layout(ROW, 512, "cuda")
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for q_len in (512, 1):
                check(layout, *inputs(q_len))
        torch.cuda.current_stream().wait_stream(stream)


def test_repeated_calls_do_not_wait_for_the_device():
    layout = compile_layout(ROW, 512, "cuda")
    for q_len in (512, 1):
        q, k, v = inputs(q_len)
        attend(q, k, v, layout, backend="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                attend(q, k, v, layout, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layouts_on_another_device_than_the_current_one():
    layouts = [compile_layout(ROW, 512, f"cuda:{index}") for index in range(2)]
    for _ in range(4):
        for index, layout in enumerate(layouts):
            for q_len in (512, 1):
                check(layout, *inputs(q_len, device=f"cuda:{index}"))
    assert torch.cuda.current_device() == 0
