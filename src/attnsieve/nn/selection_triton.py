"""Ends on a GPU without sorting.

A row that competes for a full budget drops one key, the worst it has. So a block of rows drops no more keys than it has rows: some of
its own, and *old* ones, which are alive at its first row. Once the old keys that leave in a block are listed, its rows are gone through
one by one without a look at any other key; one warp does that for 64 rows (`_drop_kernel`).

An old key leaves in a block if it is alive at the first row and does not outlive the last one. Alive after a row are the best keys up
to it, as many as the budget: those that are not worse than a threshold, found by narrowing down a value (`_threshold`). Long texts have
two or three levels of blocks. What leaves in a block leaves in the longer block around it too, its *parent*, so that only the parent's
old keys and those of its own rows are looked at (`_descend_kernel`); the longest blocks look at the whole text.

Documents: a block's old keys belong to the document that reaches into it, and the block ends for them where that document does.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.replay import launch

# Rows that one warp goes through, one after the other.
ROWS = 64
# Texts longer than this many rows have blocks of blocks, and these blocks of their own.
LEVELS = (4096, 65536)
# Keys for which no order is left to ask: they have gone or do not exist. NaN comes next.
_GONE = tl.constexpr(2**31 - 1)
_NAN = tl.constexpr(2**31 - 2)
# How far the thresholds of nearby rows often lie apart.
_NEAR = tl.constexpr(2**16)


class Documents(NamedTuple):
    """int32 [B, n] each: see `attnsieve.nn.segments.Segments`. Both None where every row is one document without padding."""

    start: Any
    stop: Any


class Old(NamedTuple):
    """Old keys that leave in a block, ascending: int32 [R, n] each, those of the block from row p on at p and after it.

    order: their place in the order of scores, see `_order`. index: which keys they are. count: at p how many; at p + 1, for guesses,
    from which order on keys are alive at row p.
    """

    order: Any
    index: Any
    count: Any


class Widening(NamedTuple):
    """`SelectionRule` beside the competition."""

    window: Any
    sinks: Any
    union: Any


def ends(sigma: Tensor, start: Tensor | None, stop: Tensor | None, budget: int, window: int, sinks: int, union: bool) -> Tensor:
    """As `SelectionRule.ends`: sigma floating point [B, H, n], start and stop of `Segments`, all on one GPU."""
    batch, heads, n = sigma.shape
    documents = Documents(start if start is None else start.contiguous(), stop if stop is None else stop.contiguous())
    result = torch.empty(sigma.shape, dtype=torch.int32, device=sigma.device)
    order, *planes = torch.empty(7, batch * heads, n, dtype=torch.int32, device=sigma.device).unbind()
    launch(
        _begin_kernel, (triton.cdiv(n, 1024), batch * heads), sigma.contiguous(), documents, order, result, n, heads, STEP=1024
    )
    old, parent_rows = None, 0
    for level, block in enumerate(_blocks(n)):
        parent, old = old, Old(*(planes[3:] if level % 2 else planes[:3]))
        step, warps = _reading(parent_rows, n)
        launch(
            _descend_kernel,
            (triton.cdiv(n, block), batch * heads),
            order,
            documents,
            parent,
            old,
            n,
            min(budget, n),
            heads,
            parent_rows,
            block,
            STEP=step,
            num_warps=warps,
        )
        parent_rows = block
    launch(
        _drop_kernel,
        (triton.cdiv(n, ROWS), batch * heads),
        order,
        documents,
        old,
        result,
        n,
        min(budget, n),
        heads,
        Widening(window, sinks, int(union)),
        ROWS=ROWS,
        num_warps=1,
    )
    return result


def _blocks(n: int) -> tuple[int, ...]:
    """Rows of the blocks of each level: all levels read about as many keys."""
    bits = (n // ROWS).bit_length()
    if n <= LEVELS[0]:
        return (ROWS,)
    if n <= LEVELS[1]:
        return ROWS << bits // 2, ROWS
    return ROWS << 2 * (bits - 1) // 3, ROWS << bits // 3, ROWS


def _reading(parent_rows: int, n: int) -> tuple[int, int]:
    """Keys that a program reads at a time, and its warps. It goes through all keys if there is no parent, else through twice as many
    as the parent has rows, at the most; few are counted by one warp, which waits for no other. `_count` takes up to 1023 steps."""
    if parent_rows == 0:
        return max(2048, triton.next_power_of_2(n >> 9)), 8
    return (256, 1) if parent_rows <= 4096 else (max(1024, triton.next_power_of_2(parent_rows >> 8)), 4)


@triton.jit
def _order(score):
    """int32 in the order of float32 scores; -0.0 equals 0.0, NaN is above every number."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


@triton.jit
def _document(documents, n, o_row, slot, ok):
    """Start and stop of the document of a slot, in row o_row of the batch."""
    if documents.start is None:
        return slot * 0, slot * 0 + n
    else:
        start = tl.load(documents.start + o_row * n + slot, mask=ok, other=0)
        return start, tl.load(documents.stop + o_row * n + slot, mask=ok, other=0)


@triton.jit
def _begin_kernel(p_sigma, documents, p_order, p_ends, n, heads, STEP: tl.constexpr):
    """Order of all keys; and their ends if none were dropped."""
    i_r = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    ok = slot < n
    score = tl.load(p_sigma + i_r * n + slot, mask=ok, other=0.0).to(tl.float32)
    _, stop = _document(documents, n, i_r // heads, slot, ok)
    tl.store(p_order + i_r * n + slot, _order(score), mask=ok)
    tl.store(p_ends + i_r * n + slot, stop, mask=ok)


@triton.jit
def _descend_kernel(p_order, documents, parent, old, n, budget, heads, parent_rows, block, STEP: tl.constexpr):
    """List the old keys that leave in a block of `block` rows: of its parent's old keys and of those of the parent's rows before it."""
    # The last blocks of a text have the most keys before them: start with them.
    i_r, i_b = tl.program_id(1).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)
    p = i_b * block
    start, stop = _document(documents, n, i_r // heads, p, True)
    stop = tl.minimum(stop, p + block)
    n_left = 0
    low = tl.cast(-(2**30), tl.int32)
    if (start < p) & (stop - start > budget):
        first, n_old = start, 0
        p_old, p_index = p_order, p_order
        step = tl.cast(2**30, tl.int64)
        if parent is not None:
            top = p // parent_rows * parent_rows
            p_old, p_index = parent.order + i_r * n + top, parent.index + i_r * n + top
            n_old = tl.where(start < top, tl.load(parent.count + i_r * n + top), 0)
            first = tl.maximum(start, top)
            low = tl.load(parent.count + i_r * n + top + 1, mask=top + 1 < n, other=0)
            step = tl.cast(_NEAR, tl.int64)
        # The parent does not list those of its old keys that outlive it: they are alive in all of this block.
        unlisted = tl.minimum(budget, first - start) - n_old
        p_new = p_order + i_r * n
        alive = tl.minimum(budget, p - start) - unlisted
        low, ties_low = _threshold(p_old, n_old, p_new + first, p - first, alive, low, step, STEP)
        outliving = budget - unlisted
        high, ties_high = _threshold(p_old, n_old, p_new + first, stop - first, outliving, low, tl.cast(_NEAR, tl.int64), STEP)
        p_out, p_out_index = old.order + i_r * n + p, old.index + i_r * n + p
        seen_low, seen_high = 0, 0
        for x in range(0, n_old + p - first, STEP):
            o = x + tl.arange(0, STEP)
            is_old, is_new = o < n_old, (o >= n_old) & (o < n_old + p - first)
            key = tl.load(p_old + o, mask=is_old, other=0)
            index = first + o - n_old
            key = tl.where(is_old, key, tl.load(p_new + index, mask=is_new, other=0))
            if parent is not None:
                index = tl.where(is_old, tl.load(p_index + o, mask=is_old, other=0), index)
            inside, seen_low = _is_best(key, is_old | is_new, low, ties_low, seen_low)
            outlives, seen_high = _is_best(key, is_old | is_new, high, ties_high, seen_high)
            leaves = (inside & (outlives == 0)).to(tl.int32)
            at = n_left + tl.cumsum(leaves, 0) - 1
            tl.store(p_out + at, key, mask=leaves != 0)
            tl.store(p_out_index + at, index, mask=leaves != 0)
            n_left += tl.sum(leaves, 0)
    tl.store(old.count + i_r * n + p, n_left)
    tl.store(old.count + i_r * n + p + 1, low, mask=p + 1 < n)


@triton.jit
def _is_best(key, ok, low, ties, seen):
    """Which keys are among the best, by what `_threshold` returns, and how many keys equal `low` so far; seen: before these keys."""
    keep = ok & (key >= low)
    if ties > 0:
        tie = (ok & (key == low)).to(tl.int32)
        keep = keep & ((key > low) | (seen + tl.cumsum(tie, 0) > ties))
        seen += tl.sum(tie, 0)
    return keep, seen


@triton.jit
def _threshold(p_old, n_old, p_new, n_new, wanted, guess, step, STEP: tl.constexpr):
    """What parts the `wanted` best of two runs of keys, in the order of time, from the others: the order `low` of the worst of them,
    and how many of the keys that equal it, the oldest, are not among them.

    Every pass counts the keys from a, b and c on, and goes on between two of `low`, a, b, c and `high`. At first a is `guess`, b and c
    are 1 and 16 steps above it, because thresholds of nearby rows are near; then they part what is left in quarters.
    """
    # At least `wanted` keys are not below `low`, fewer are not below `high`.
    low, high = tl.cast(-(2**31), tl.int64), tl.cast(2**31, tl.int64)
    found = n_old + n_new
    a = tl.maximum(guess.to(tl.int64), low + 1)
    b, c = tl.minimum(a + step, high - 1), tl.minimum(a + 16 * step, high - 1)
    while (found != wanted) & (high - low > 1):
        n_a, n_b, n_c = _count(p_old, n_old, p_new, n_new, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), STEP)
        high = tl.where(n_a < wanted, a, tl.where(n_b < wanted, b, tl.where(n_c < wanted, c, high)))
        low = tl.where(n_c >= wanted, c, tl.where(n_b >= wanted, b, tl.where(n_a >= wanted, a, low)))
        found = tl.where(n_c >= wanted, n_c, tl.where(n_b >= wanted, n_b, tl.where(n_a >= wanted, n_a, found)))
        a = low + tl.maximum((high - low) // 4, 1)
        b = low + (high - low) // 2
        c = low + (high - low) * 3 // 4
    return low.to(tl.int32), found - wanted


@triton.jit
def _count(p_old, n_old, p_new, n_new, a, b, c, STEP: tl.constexpr):
    """How many of two runs of keys are at least a, b and c, which ascend."""
    # Ten bits each: up to 1023 steps.
    counts = tl.zeros([STEP], tl.int32)
    for x in range(0, n_old, STEP):
        counts += _compared(p_old, x + tl.arange(0, STEP), n_old, a, b, c)
    for x in range(0, n_new, STEP):
        counts += _compared(p_new, x + tl.arange(0, STEP), n_new, a, b, c)
    return tl.sum(counts & 1023, 0), tl.sum((counts >> 10) & 1023, 0), tl.sum(counts >> 20, 0)


@triton.jit
def _compared(p_keys, x, n, a, b, c):
    """Three bits, ten places apart: whether keys x are at least a, b and c."""
    key = tl.load(p_keys + x, mask=x < n, other=-(2**31))
    return tl.where(key >= c, 1 + 2**10 + 2**20, tl.where(key >= b, 1 + 2**10, tl.where(key >= a, 1, 0)))


@triton.jit
def _drop_kernel(p_order, documents, old, p_ends, n, budget, heads, widening, ROWS: tl.constexpr):
    """Go through the rows of a block: each drops the worst key it has, the oldest of equal ones."""
    i_r, p = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    slot = p + r
    start, stop = _document(documents, n, i_r // heads, slot, slot < n)
    full = (slot < n) & (slot - start >= budget)
    if tl.max(full.to(tl.int32), 0) == 0:
        return
    o_p = i_r * n + p
    n_old = tl.load(old.count + o_p)
    key = tl.load(p_order + o_p + r, mask=slot < n, other=_GONE)
    old_key = tl.load(old.order + o_p + r, mask=r < n_old, other=_GONE)
    # Keys are named by their order in time: the old ones, then those of the block.
    dropped = tl.full([ROWS], -1, tl.int32)
    for x in range(0, ROWS):
        i_start, _ = _document(documents, n, i_r // heads, tl.minimum(p + x, n - 1), True)
        # Rows above it and its own document only.
        here = tl.where((r <= x) & (slot >= i_start), key, _GONE)
        before = old_key
        if documents.start is not None:
            before = tl.where(i_start < p, old_key, _GONE)
        worst = tl.min(tl.minimum(here, before), 0)
        name = tl.minimum(tl.where(before == worst, r, 2 * ROWS), tl.where(here == worst, ROWS + r, 2 * ROWS))
        gone = tl.where((p + x < n) & (p + x - i_start >= budget), tl.min(name, 0), -1)
        old_key = tl.where(r == gone, _GONE, old_key)
        key = tl.where(ROWS + r == gone, _GONE, key)
        dropped = tl.where(r == x, gone, dropped)
    was_old = (dropped >= 0) & (dropped < ROWS)
    index = tl.load(old.index + o_p + dropped, mask=was_old, other=0)
    index = tl.where(was_old, index, p + dropped - ROWS)
    end = tl.maximum(slot, index + widening.window) if widening.union else slot + widening.window
    end = tl.where(index - start < widening.sinks, stop, tl.minimum(end, stop))
    tl.store(p_ends + i_r * n + index, end, mask=dropped >= 0)
