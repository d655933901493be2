"""The selection against its definition: spec vectors, laws, ties, documents, windows, chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsieve import Spans, UserError
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule, competition_ends, ordinal, score_of, strict_key
from attnsieve.nn.selection_oracle import brute_force_mask, chunked_ends, heap_ends

SIGMA = [4, 7, 2, 7, 5, 5, 9, 1, 5, 7, 3, 8]
ENDS = [4, 9, 3, 11, 5, 6, 12, 7, 8, 12, 10, 12]


def row(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, None]


def mask_of(ends: torch.Tensor) -> torch.Tensor:
    """bool [n, n] of one row of ends."""
    index = torch.arange(len(ends))
    return (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])


def ends_of(values, budget=3, spans=None, **rule) -> list[int]:
    sigma = row(values)
    segments = None if spans is None else Segments.of_spans(spans, 1, sigma.shape[-1])
    return SelectionRule(budget, **rule).ends(sigma, segments)[0, 0].tolist()


def test_vector_of_twelve_keys():
    assert ends_of(SIGMA) == ENDS
    kept = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [1, 3, 4], [1, 3, 5], *[[1, 3, 6]] * 3, *[[3, 6, 9]] * 2, [6, 9, 11]]
    mask = mask_of(torch.tensor(ENDS))
    assert [mask[i].nonzero().flatten().tolist() for i in range(12)] == kept
    assert torch.equal(mask, brute_force_mask(row(SIGMA)[0, 0], 3))


def test_vectors_of_sign_ties_window_and_sinks():
    assert ends_of([-s for s in SIGMA]) == [10, 3, 12, 4, 5, 7, 6, 12, 8, 9, 12, 11]
    assert ends_of([0.5] * 12) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 12]
    union = [4, 9, 4, 11, 6, 7, 12, 9, 10, 12, 12, 12]
    assert ends_of(SIGMA, window=2, union=True) == union
    assert ends_of(SIGMA, window=2, union=True, sinks=1) == [12, *union[1:]]
    outside = ends_of(SIGMA, window=2)
    assert outside == [6, 11, 5, 12, 7, 8, 12, 9, 10, 12, 12, 12]
    assert mask_of(torch.tensor(outside)).sum(1).tolist() == [1, 2, 3, 4] + [5] * 8


def test_vectors_of_packed_documents_and_left_padding():
    assert ends_of(SIGMA, spans=Spans.packed([7, 5])) == [4, 7, 3, 7, 5, 6, 7, 10, 12, 12, 11, 12]
    assert ends_of(SIGMA, spans=Spans.left_padded(torch.tensor([2]), 12, 12)) == [0, 1, 5, 11, 6, 8, 12, 7, 9, 12, 10, 12]


def scores(n: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    if kind == "ties":
        return torch.randint(-2, 3, (n,), generator=generator).float()
    if kind == "equal":
        return torch.full((n,), -1.5)
    if kind == "zeros":
        return torch.where(torch.rand(n, generator=generator) < 0.5, 0.0, -0.0)
    drift = {"random": 0.0, "rising": 1.0, "falling": -1.0}[kind]
    return torch.randn(n, generator=generator) + drift * torch.arange(n)


KINDS = ("random", "ties", "equal", "zeros", "rising", "falling")


@settings(max_examples=75, deadline=None)
@given(st.integers(1, 70), st.integers(1, 80), st.sampled_from(KINDS), st.integers(0, 2**31), st.integers(1, 80))
def test_parallel_heap_chunked_and_brute_force_agree(n, budget, kind, seed, chunk):
    sigma = scores(n, kind, torch.Generator().manual_seed(seed))
    heap = heap_ends(sigma, budget)
    assert torch.equal(mask_of(heap), brute_force_mask(sigma, budget))
    assert torch.equal(competition_ends(sigma[None, None], budget)[0, 0], heap)
    assert torch.equal(chunked_ends(sigma[None, None], budget, chunk)[0, 0], heap)


@pytest.mark.parametrize(("n", "budget"), [(1024, 64), (1025, 1), (3000, 257), (511, 511), (512, 2000)])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_long_batched_rows_equal_the_heap(n, budget, kind):
    generator = torch.Generator().manual_seed(n)
    sigma = torch.stack([scores(n, kind, generator) for _ in range(6)]).view(2, 3, n)
    ends = competition_ends(sigma, budget)
    assert ends.dtype == torch.int32
    expected = torch.stack([heap_ends(line, budget) for line in sigma.flatten(0, 1)]).view_as(ends)
    assert torch.equal(ends, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_identities(n, budget, kind, seed):
    sigma = scores(n, kind, torch.Generator().manual_seed(seed))[None, None]
    ends, index = competition_ends(sigma, budget)[0, 0], torch.arange(n)
    assert int((ends - index).sum()) == int((index + 1).clamp_max(budget).sum())
    assert int((ends == n).sum()) == min(budget, n)
    assert sorted(ends[ends < n].tolist()) == list(range(budget, n))
    for m in (1, n // 2 + 1, n):
        assert torch.equal(competition_ends(sigma[..., :m], budget)[0, 0], ends[:m].clamp_max(m))
    assert bool((competition_ends(sigma, budget + 1)[0, 0] >= ends).all())
    if kind == "ties":
        assert torch.equal(competition_ends(sigma**3 + sigma, budget)[0, 0], ends)
    if budget >= n:
        assert bool((ends == n).all())


@st.composite
def layouts(draw):
    """(spans of one row, number of slots): documents with padding before, between and after."""
    rows, slot = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 12))
        rows.append((0, slot, length, slot, length))
        slot += length + draw(st.integers(0, 2))
    return rows, slot + draw(st.integers(1, 3))


@settings(max_examples=50, deadline=None)
@given(layouts(), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_each_document_is_solved_alone(layout, budget, window, sinks, union, seed):
    rows, slots = layout
    sigma = scores(slots, "ties", torch.Generator().manual_seed(seed))[None, None]
    rule = SelectionRule(budget, window, sinks, union)
    expected = torch.arange(slots, dtype=torch.int32)
    for _, _, _, start, length in rows:
        if length:
            expected[start : start + length] = rule.ends(sigma[..., start : start + length])[0, 0] + start
    segments = Segments.of_spans(Spans.of(rows), 1, slots)
    sigma[..., ~segments.real[0]] = torch.nan
    assert torch.equal(rule.ends(sigma, segments)[0, 0], expected)


def window_oracle(sigma: torch.Tensor, rule: SelectionRule) -> torch.Tensor:
    """The rule by its words, row by row."""
    n = len(sigma)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        newest = range(max(0, i - rule.window + 1), i + 1)
        competing = range(i + 1) if rule.union else range(max(0, i + 1 - rule.window))
        best = sorted(competing, key=lambda j: (float(sigma[j]), j), reverse=True)[: rule.keep_window_size]
        mask[i, [*best, *(newest if rule.window else []), *range(min(rule.sinks, i + 1))]] = True
    return mask


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 9), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
def test_window_and_sinks_equal_their_words(n, budget, window, sinks, union, seed):
    sigma = scores(n, "ties", torch.Generator().manual_seed(seed))
    rule = SelectionRule(budget, window, sinks, union)
    mask = mask_of(rule.ends(sigma[None, None])[0, 0])
    assert torch.equal(mask, window_oracle(sigma, rule))
    assert int(mask.sum(1).max()) <= rule.slots


def test_batch_rows_and_heads_do_not_mix():
    sigma = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    together = SelectionRule(7, 3).ends(sigma)
    for b in range(3):
        for h in range(2):
            assert torch.equal(SelectionRule(7, 3).ends(sigma[b : b + 1, h : h + 1])[0, 0], together[b, h])


def test_order_is_total_and_matches_floats():
    values = torch.tensor([-torch.inf, -3.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan, -torch.nan])
    keys = ordinal(values)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[3] == keys[4]
    assert keys[8] == keys[9]
    assert len(keys.unique()) == 8
    assert strict_key(values[3], torch.tensor(1)) < strict_key(values[4], torch.tensor(2))
    assert torch.equal(score_of(strict_key(values[:8], torch.arange(8) + 2**31)), values[:8])


def test_nan_is_rejected_but_not_in_padding():
    sigma = row(SIGMA)
    sigma[0, 0, 1] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        SelectionRule(3).ends(sigma)
    padded = Segments.of_spans(Spans.left_padded(torch.tensor([2]), 12, 12), 1, 12)
    assert SelectionRule(3).ends(sigma, padded)[0, 0].tolist() == [0, 1, 5, 11, 6, 8, 12, 7, 9, 12, 10, 12]


def test_unchecked_nan_stays_to_the_end():
    sigma = -row(SIGMA)
    sigma[0, 0, 1] = -torch.nan
    assert SelectionRule(1).ends(sigma, check_nan=False)[0, 0].tolist()[1] == 12


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0,), "keep_window_size"),
        ((2.5,), "keep_window_size"),
        ((2**31,), "keep_window_size"),
        ((4, -1), "window"),
        ((4, 2**31 - 1), "window"),
        ((4, 0, -2), "sinks"),
    ],
)
def test_bad_rules_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        SelectionRule(*arguments)


def test_a_rule_of_any_size_keeps_what_there_is():
    most = SelectionRule(2**29, 2**29, 2**29)
    assert most.ends(torch.randn(1, 2, 9)).eq(9).all()
    assert SelectionRule(1, 2**29).ends(torch.randn(1, 2, 9)).eq(9).all()


def test_bad_scores_are_refused():
    for bad in (torch.zeros(3, 4), torch.zeros(1, 2, 3, dtype=torch.int64)):
        with pytest.raises(UserError, match="scores"):
            SelectionRule(2).ends(bad)
    with pytest.raises(UserError, match="segments"):
        SelectionRule(2).ends(torch.zeros(1, 2, 3), Segments.whole(1, 4))


def test_segments_of_masks_and_position_ids():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    segments = Segments.of_inputs(mask, None)
    assert segments.start.tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 0, 4]]
    assert segments.stop.tolist() == [[0, 1, 5, 5, 5], [4, 4, 4, 4, 4]]
    assert torch.equal(segments.real, mask.bool())
    packed = Segments.of_inputs(None, torch.tensor([[0, 1, 2, 0, 1]]))
    assert packed.start.tolist() == [[0, 0, 0, 3, 3]]
    assert packed.stop.tolist() == [[3, 3, 3, 5, 5]]
