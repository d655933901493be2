"""Ragged storage on a GPU: decode against the float64 oracle, in a CUDA graph, without waiting, and under transformers."""

import pytest
import torch
from transformers import DynamicCache

from attnsieve import Spans, compile_layout
from attnsieve.backends.call import Call
from attnsieve.hf import apply
from attnsieve.patterns import columns, dense, diagonals, empty, sink, window
from attnsieve.ragged import Kept, RaggedStore
from attnsieve.testing import assert_within_budget
from tests.gpu.test_triton import poison
from tests.hf_tiny import tiny, tokens
from tests.test_hf_ragged import ragged_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIXED = [sink(2) | window(9), columns(3, 50, 900) | diagonals(0, 40), dense(), columns(0, 70) | window(200), empty()]
SCALE = 0.2


class Text:
    """Random tokens of a batch padded on the left, a store of the first n of them, and the oracle's call for the next."""

    def __init__(self, row, kv_heads, n=1500, pads=(0,), width=64, v_width=None, dtype=torch.bfloat16, capacity=2000):
        make = lambda heads, d: torch.randn(len(pads), heads, n + 8, d, device="cuda", dtype=dtype)  # noqa: E731
        self.q, self.k, self.v = make(len(row), width), make(kv_heads, width), make(kv_heads, v_width or width)
        self.n, self.pads, self.layout = n, pads, compile_layout(row, capacity, "cuda")
        kept = Kept.of(row, kv_heads, capacity)
        self.store = RaggedStore(kept, kept.index(torch.device("cuda"), 500), self.k, self.v)
        self.store.fill(self.k[:, :, :n], self.v[:, :, :n], pads, 0)

    def inputs(self, at):
        return [tensor[:, :, at : at + 1] for tensor in (self.q, self.k, self.v)]

    def check(self, at, out, lse):
        q, end = self.q[:, :, at : at + 1], at + 1
        spans = Spans.left_padded(torch.tensor(self.pads, device="cuda"), 1, end)
        assert_within_budget(out, lse, Call(q, self.k[:, :, :end], self.v[:, :, :end], self.layout, spans, SCALE))

    def check_steps(self, steps=3):
        for at in range(self.n, self.n + steps):
            poison()
            self.check(at, *self.store.step(*self.inputs(at), SCALE, "triton"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
def test_widths(width, dtype):
    Text(MIXED[:4], 2, width=width, dtype=dtype, pads=(0, 3, 50, 700)).check_steps()


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 32])
def test_groups(group):
    Text([MIXED[h % 4] for h in range(2 * group)], 2, v_width=32).check_steps()


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 199, 200, 201, 1900])
def test_lengths(n):
    Text(MIXED[:4], 1, n=n).check_steps()


def test_rows_of_different_length():
    Text(MIXED, 5, pads=(0, 37, 1400, 1499)).check_steps()


def test_heads_that_keep_nothing():
    Text([empty()] * 2, 1).check_steps()


def test_a_step_replays_in_a_graph():
    text = Text(MIXED[:4], 2)
    text.store.step(*text.inputs(text.n), SCALE)
    q, k, v = (tensor.clone() for tensor in text.inputs(text.n + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = text.store.step(q, k, v, SCALE)
    for at in range(text.n + 1, text.n + 5):
        for static, new in zip((q, k, v), text.inputs(at), strict=True):
            static.copy_(new)
        graph.replay()
        text.check(at, out, lse)


def test_a_step_does_not_wait_for_the_device():
    text = Text(MIXED[:4], 2)
    text.store.step(*text.inputs(text.n), SCALE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        text.store.step(*text.inputs(text.n + 1), SCALE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("corner", [0, 9])
@pytest.mark.parametrize("padding", [0, 7])
def test_generation_equals_that_with_all_keys(corner, padding):
    model = tiny("llama").to("cuda")
    prompt, mask = tokens(2, 40).cuda(), torch.ones(2, 40, dtype=torch.long, device="cuda")
    mask[1, :padding] = 0
    results = []
    with apply(model, ragged_plan(model, corner)) as handle:
        for cache in (DynamicCache(config=model.config), handle.cache(100)):
            settings = {"do_sample": False, "attention_mask": mask, "past_key_values": cache}
            results.append(model.generate(prompt, max_new_tokens=40, **settings))
    assert torch.equal(*results)
