"""The bounded cache against attention over the whole text, step by step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsieve import Spans, UserError
from attnsieve.nn.cache import BoundedCache
from attnsieve.nn.functional import dynamic_mask_attention
from attnsieve.nn.scores import key_scores
from attnsieve.nn.selection import SelectionRule

KV_HEADS, WIDTH = 2, 4


class Text:
    """A random batch and its attention over everything."""

    def __init__(self, n: int, batch: int = 2, seed: int = 0, ties: bool = False, heads: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.q, self.k = normal(batch, heads, n, WIDTH), normal(batch, KV_HEADS, n, WIDTH)
        self.v = normal(batch, KV_HEADS, n, WIDTH)
        if ties:
            self.v = self.v.round().clamp(-1, 1)
        self.weight = normal(KV_HEADS, KV_HEADS * WIDTH) if not ties else torch.ones(KV_HEADS, KV_HEADS * WIDTH).double()
        self.a = torch.tensor([0.3, -0.5], dtype=torch.float64)

    def full(self, rule: SelectionRule, rows: slice = slice(None), spans: Spans | None = None) -> torch.Tensor:
        options = {"window": rule.window, "sinks": rule.sinks, "union": rule.union, "spans": spans}
        q, k, v = (tensor[rows] for tensor in (self.q, self.k, self.v))
        size = rule.keep_window_size
        return dynamic_mask_attention(q, k, v, dt_weight=self.weight, A=self.a, keep_window_size=size, **options)

    def keys(self, first: int, last: int) -> tuple[torch.Tensor, ...]:
        k, v = self.k[:, :, first:last], self.v[:, :, first:last]
        return k, v, *key_scores(v, self.weight, None, self.a)

    def decode(self, cache: BoundedCache, cuts: list[int], real: torch.Tensor | None = None, **options) -> torch.Tensor:
        """The text in pieces that end at `cuts`."""
        pieces = zip([0, *cuts], cuts, strict=False)
        return torch.cat([self.piece(cache, first, last, real, **options) for first, last in pieces], dim=2)

    def piece(self, cache: BoundedCache, first: int, last: int, real: torch.Tensor | None = None, **options) -> torch.Tensor:
        mask = None if real is None else real[:, first:last]
        return cache.attend(self.q[:, :, first:last], *self.keys(first, last), real=mask, **options)


RULES = [
    SelectionRule(5),
    SelectionRule(1),
    SelectionRule(5, window=3),
    SelectionRule(5, window=3, union=True),
    SelectionRule(4, window=7, sinks=2),
    SelectionRule(4, window=7, sinks=2, union=True),
    SelectionRule(3, sinks=4),
    SelectionRule(60),
]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("prefill", [1, 13])
@pytest.mark.parametrize("ties", [False, True])
def test_every_step_equals_attention_over_the_whole_text(rule, prefill, ties):
    text = Text(40, ties=ties)
    out = text.decode(BoundedCache(rule), [prefill, *range(prefill + 1, 41)])
    close(out, text.full(rule))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(RULES),
    st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(0, 6), min_size=2, max_size=2),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from(["reference", "portable"]),
)
def test_any_chunks_and_steps_of_a_padded_batch(rule, cuts, pads, ties, seed, backend):
    text = Text(50, seed=seed, ties=ties)
    cuts = sorted({*cuts, 50} - set(range(1, max(pads) + 1)))
    real = torch.arange(50) >= torch.tensor(pads)[:, None]
    expected = text.full(rule, spans=Spans.left_padded(torch.tensor(pads), 50, 50))
    for tensor in (text.q, text.k, text.v):
        tensor.transpose(1, 2)[~real] = torch.nan
    close(text.decode(BoundedCache(rule), cuts, real, backend=backend), expected)


def test_memory_does_not_grow():
    text, cache = Text(200), BoundedCache(SelectionRule(8, window=4, sinks=2))
    text.decode(cache, [100])
    shapes = [tensor.shape for tensor in cache.slots.tensors()]
    for t in range(100, 200):
        text.piece(cache, t, t + 1)
    assert cache.seen == 200
    assert cache.nbytes == sum(2 * 2 * 15 * size for size in (WIDTH * 8, WIDTH * 8, 8, 8))
    assert [tensor.shape for tensor in cache.slots.tensors()] == shapes
    assert len(cache.slots) == 15


def test_copies_branch_and_reorder_moves_rows():
    text, rule = Text(30, batch=3), SelectionRule(4, window=2)
    cache = BoundedCache(rule)
    text.decode(cache, [20])
    branch = copy.deepcopy(cache)
    text.decode(BoundedCache(rule), [20, 21])
    rows = torch.tensor([2, 0, 2])
    cache.reorder(rows)
    moved = copy.copy(text)
    moved.q, moved.k, moved.v = text.q[rows], text.k[rows], text.v[rows]
    close(moved.piece(cache, 20, 21), moved.full(rule)[:, :, 20:21])
    close(text.piece(branch, 20, 21), text.full(rule)[:, :, 20:21])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(RULES),
    st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 20)), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.integers(0, 12),
    st.integers(0, 1000),
)
def test_tokens_taken_back_leave_no_trace(rule, moves, pads, start, seed):
    """Chunks and steps, and tokens taken back in between; then the text to its end."""
    text, cache, at, recorded = Text(50, seed=seed, ties=True), BoundedCache(rule), 0, 0
    real = torch.arange(50) >= torch.tensor(pads)[:, None]
    expected = text.full(rule, spans=Spans.left_padded(torch.tensor(pads), 50, 50))
    if start:
        at = 3 + start
        close(text.piece(cache, 0, at, real), expected[:, :, :at])
    cache.record()
    for size, steps, back in moves:
        last = min(50, max(4, at + size))
        cuts = range(at, last + 1) if steps and at else (at, last)
        for first, following in itertools.pairwise(cuts):
            close(text.piece(cache, first, following, real), expected[:, :, first:following])
        recorded += last - at
        back = min(back, recorded if start else max(0, min(recorded, last - 4)))
        cache.take_back(back)
        at, recorded = last - back, 0
        assert cache.seen == at
    if at < 50:
        close(text.piece(cache, at, 50, real), expected[:, :, at:])


def test_recording_follows_reordered_rows_and_has_limits():
    text, rule = Text(30, batch=3), SelectionRule(4, window=2, sinks=1)
    cache = BoundedCache(rule)
    text.decode(cache, [20])
    plain = cache.nbytes
    with pytest.raises(UserError, match=r"record\(\)"):
        cache.take_back(1)
    cache.record()
    text.decode(copy.deepcopy(cache), [20])
    for t in range(20, 26):
        text.piece(cache, t, t + 1)
    assert cache.nbytes > 2 * plain
    rows = torch.tensor([2, 0, 2])
    cache.reorder(rows)
    cache.take_back(4)
    with pytest.raises(UserError, match="the 0 tokens"):
        cache.take_back(1)
    moved = copy.copy(text)
    moved.q, moved.k, moved.v = text.q[rows], text.k[rows], text.v[rows]
    close(moved.piece(cache, 22, 30), moved.full(rule)[:, :, 22:])
    cache.stop_recording()
    assert cache.nbytes == plain


def test_reset_starts_anew():
    text, rule = Text(12), SelectionRule(4)
    cache = BoundedCache(rule)
    text.decode(cache, [10])
    cache.reset()
    close(text.decode(cache, [6, 12]), text.full(rule))


def test_broken_conditions_are_refused():
    text, cache = Text(12), BoundedCache(SelectionRule(4))
    weight = torch.nn.Parameter(text.weight)
    cache.attend(text.q[:, :, :8], *text.keys(0, 8), parameters=(weight,))
    with pytest.raises(UserError, match="batch rows"):
        cache.attend(text.q[:1, :, 8:9], *text.keys(8, 9))
    with pytest.raises(UserError, match="one query"):
        cache.attend(text.q[:, :, 8:10], *text.keys(8, 9))
    with pytest.raises(UserError, match="left"):
        cache.attend(text.q[:, :, 8:10], *text.keys(8, 10), real=torch.tensor([[True, False]] * 2))
    with pytest.raises(UserError, match="decode step"):
        cache.attend(text.q[:, :, 8:9], *text.keys(8, 9), real=torch.tensor([[True], [False]]))
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(UserError, match="changed"):
        cache.attend(text.q[:, :, 8:9], *text.keys(8, 9), parameters=(weight,))
