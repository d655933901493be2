"""Scattered diagonals on a GPU, against the float64 oracle."""

from dataclasses import replace

import pytest
import torch

from attnsieve import attend
from attnsieve.backends import triton as backend
from attnsieve.bench.masks import MASKS
from attnsieve.spans import Spans
from attnsieve.testing import assert_within_budget
from tests.gpu.test_triton import call_of, poison

scattered = pytest.importorskip("attnsieve.backends.triton.scattered", exc_type=ImportError).scattered
hopper = pytest.importorskip("attnsieve.backends.triton.hopper", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
N = 2100


def run(call):
    assert scattered(call) is not None
    poison()
    return backend.run(call)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_prefill(group, dtype, width, shared):
    layout = MASKS["A"](N, 2 if shared else 2 * group, "cuda")
    call = call_of(layout, group=group, kv_heads=2, n=N, width=width, dtype=dtype)
    assert (scattered(call).rest.most_keys is not None) == (width == 128 and hopper.is_there(call))
    assert_within_budget(*run(call), call)
    bare = replace(call, key_bias=None)
    assert_within_budget(*run(bare), bare)


@pytest.mark.parametrize("q_len", [40, 300, N])
@pytest.mark.parametrize("pads", [None, (0, 401), (N, 7)], ids=["whole", "padded", "empty"])
def test_chunks_and_padding_that_holds_nan(q_len, pads):
    spans = None if pads is None else Spans.left_padded(torch.tensor(pads, device="cuda"), q_len, N)
    call = call_of(MASKS["A"](N, 8, "cuda"), batch=2, group=4, kv_heads=2, q_len=q_len, n=N, width=128, spans=spans)
    for b, pad in enumerate(pads or ()):
        call.k[b, :, :pad] = torch.nan
        call.v[b, :, :pad] = torch.nan
        call.q[b, :, : max(0, pad - N + q_len)] = torch.nan
    assert_within_budget(*run(call), call)


@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
def test_what_is_not_finite_reaches_only_rows_that_keep_its_key(where, value):
    call = call_of(MASKS["A"](N, 8, "cuda"), group=4, kv_heads=2, n=N, width=128)
    run(call)
    getattr(call, where)[:, :, 140, 3] = value
    out, _ = run(call)
    keeps = call.layout.dense(torch.arange(N, device="cuda"), torch.tensor([140], device="cuda"))[..., 0]
    assert torch.equal(out.isfinite().all(-1), ~keeps)


def test_rows_that_keep_nothing_else_and_scores_beyond_float32():
    layout = MASKS["A"](N, 8, "cuda")
    call = call_of(replace(layout, end=torch.zeros_like(layout.end)), group=4, kv_heads=2, n=N, width=128)
    call.q.mul_(40)
    out, lse = run(call)
    assert bool((lse == -torch.inf).any())
    assert_within_budget(out, lse, call)


def test_calls_are_repeated_and_graphs_replay_them():
    call = replace(call_of(MASKS["A"](N, 8, "cuda"), group=4, kv_heads=2, n=N, width=128), key_bias=None)

    def attended():
        return attend(call.q, call.k, call.v, call.layout, backend="triton", return_lse=True)

    for _ in range(4):
        call.q.normal_()
        assert_within_budget(*attended(), call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attended()
    for _ in range(2):
        out.fill_(torch.nan)
        call.q.normal_()
        graph.replay()
        assert_within_budget(out, lse, call)
