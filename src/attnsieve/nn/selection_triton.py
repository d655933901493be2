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

from math import isqrt
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch
from attnsieve.nn.contenders_triton import GONE, Documents, all_contend, document_of, find_contenders

# Rows that one warp goes through, one after the other.
ROWS = 64
# Contenders more than which are parted into longer blocks first.
MOST = 4096
# Texts longer than this, and than this many budgets, are looked through for contenders: it takes as long as this many rows.
LONG = 8192, 8
# Keys that a program of the longer blocks, and of the others, reads at a time, and its warps.
READ = (2048, 8), (1024, 4)
# How far the thresholds of nearby rows often lie apart.
_NEAR = tl.constexpr(2**16)


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
    sigma, budget = sigma.contiguous(), min(budget, n)
    if n > max(LONG[0], LONG[1] * budget):
        contenders = find_contenders(sigma, documents, result, budget, window, sinks)
    else:
        contenders = all_contend(sigma, documents, result)
    planes = torch.empty(6, batch * heads, n, dtype=torch.int32, device=sigma.device).unbind()
    old, longer = Old(*planes[:3]), None
    if n > MOST:
        longer = Old(*planes[3:])
        grid, step = (isqrt(n // ROWS) + 1, batch * heads), max(READ[0][0], triton.next_power_of_2(n >> 9))
        sizes = (n, budget, heads, MOST, ROWS)
        launch(_descend_kernel, grid, contenders, documents, None, longer, *sizes, LONGER=True, STEP=step, num_warps=READ[0][1])
    grid, step = (triton.cdiv(n, ROWS), batch * heads), max(READ[1][0], triton.next_power_of_2(n >> 13))
    sizes = (n, budget, heads, MOST, ROWS)
    launch(_descend_kernel, grid, contenders, documents, longer, old, *sizes, LONGER=False, STEP=step, num_warps=READ[1][1])
    widening = Widening(window, sinks, int(union))
    launch(_drop_kernel, grid, contenders, documents, old, result, n, budget, heads, widening, ROWS=ROWS, num_warps=1)
    return result


@triton.jit
def _count_of(contenders, i_r, n):
    """How many keys compete in row i_r."""
    if contenders.count is None:
        return n
    else:
        return tl.load(contenders.count + i_r)


@triton.jit
def _slot_of(contenders, i_r, n, x, ok):
    if contenders.slot is None:
        return x
    else:
        return tl.load(contenders.slot + i_r * n + x, mask=ok, other=0)


@triton.jit
def _document(contenders, documents, n, count, heads, i_r, x, ok):
    """Start and stop of the document of contender x, counted in contenders."""
    if documents.start is None:
        return x * 0, x * 0 + count
    else:
        slot = _slot_of(contenders, i_r, n, x, ok)
        start, stop = document_of(documents, n, i_r // heads, slot, ok)
        if contenders.before is not None:
            start = tl.load(contenders.before + i_r * n + start, mask=ok, other=0)
            after = tl.load(contenders.before + i_r * n + stop, mask=ok & (stop < n), other=0)
            stop = tl.where(stop < n, after, count)
        return start, stop


@triton.jit
def _longer_block(count, most, ROWS):
    """Contenders of a longer block, 0 if there are none: with blocks of about this length both levels read the fewest keys."""
    block = tl.cast(0, tl.int64)
    if count > most:
        block = tl.cast(ROWS, tl.int64)
        while block * block < tl.cast(count, tl.int64) * ROWS:
            block *= 2
    return block.to(tl.int32)


@triton.jit
def _descend_kernel(
    contenders, documents, parent, old, n, budget, heads, most, ROWS: tl.constexpr, LONGER: tl.constexpr, STEP: tl.constexpr
):
    """List the old keys that leave in a block: of its parent's old keys and of those of the parent's rows before it."""
    # The last blocks of a text have the most keys before them: start with them.
    i_r, i_b = tl.program_id(1).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)
    count = _count_of(contenders, i_r, n)
    longer = _longer_block(count, most, ROWS)
    block = longer if LONGER else ROWS
    p = i_b * block
    if (p >= count) | (block == 0):
        return
    start, stop = _document(contenders, documents, n, count, heads, i_r, p, True)
    stop = tl.minimum(stop, p + block)
    n_left = 0
    low = tl.cast(-(2**30), tl.int32)
    if (start < p) & (stop - start > budget):
        p_new = contenders.order + i_r * n
        first, n_old, step = start, 0, tl.cast(2**30, tl.int64)
        p_old, p_index = p_new, p_new
        if parent is not None:  # noqa: SIM102 - this one is decided by the compiler
            if longer > 0:
                top = p // longer * longer
                p_old, p_index = parent.order + i_r * n + top, parent.index + i_r * n + top
                n_old = tl.where(start < top, tl.load(parent.count + i_r * n + top), 0)
                first = tl.maximum(start, top)
                low = tl.load(parent.count + i_r * n + top + 1, mask=top + 1 < n, other=0)
                step = tl.cast(_NEAR, tl.int64)
        # The parent does not list those of its old keys that outlive it: they are alive in all of this block.
        unlisted = tl.minimum(budget, first - start) - n_old
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
def _drop_kernel(contenders, documents, old, p_ends, n, budget, heads, widening, ROWS: tl.constexpr):
    """Go through the rows of a block: each drops the worst key it has, the oldest of equal ones."""
    i_r, p = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    count = _count_of(contenders, i_r, n)
    if p >= count:
        return
    r = tl.arange(0, ROWS)
    x, real = p + r, p + r < count
    start, _ = _document(contenders, documents, n, count, heads, i_r, x, real)
    full = real & (x - start >= budget)
    if tl.max(full.to(tl.int32), 0) == 0:
        return
    o_p = i_r * n + p
    n_old = tl.load(old.count + o_p)
    key = tl.load(contenders.order + o_p + r, mask=real, other=GONE)
    old_key = tl.load(old.order + o_p + r, mask=r < n_old, other=GONE)
    # Keys are named by their order in time: the old ones, then those of the block.
    dropped = tl.full([ROWS], -1, tl.int32)
    for row in range(0, ROWS):
        here, before, drops = key, old_key, p + row >= budget
        if documents.start is not None:
            # Rows of its own document only.
            i_start = tl.sum(tl.where(r == row, start, 0), 0)
            drops = p + row - i_start >= budget
            here, before = tl.where(x >= i_start, key, GONE), tl.where(i_start < p, old_key, GONE)
        here = tl.where(r <= row, here, GONE)
        worst = tl.min(tl.minimum(here, before), 0)
        name = tl.minimum(tl.where(before == worst, r, 2 * ROWS), tl.where(here == worst, ROWS + r, 2 * ROWS))
        gone = tl.where((p + row < count) & drops, tl.min(name, 0), -1)
        old_key = tl.where(r == gone, GONE, old_key)
        key = tl.where(ROWS + r == gone, GONE, key)
        dropped = tl.where(r == row, gone, dropped)
    _store_ends(contenders, documents, old, p_ends, n, heads, widening, i_r, p, dropped, ROWS)


@triton.jit
def _store_ends(contenders, documents, old, p_ends, n, heads, widening, i_r, p, dropped, ROWS: tl.constexpr):
    """The ends of the keys that the rows of a block drop, by their names in `_drop_kernel`; -1: none."""
    some, was_old = dropped >= 0, (dropped >= 0) & (dropped < ROWS)
    index = tl.load(old.index + i_r * n + p + dropped, mask=was_old, other=0)
    index = tl.where(was_old, index, p + dropped - ROWS)
    slot = _slot_of(contenders, i_r, n, p + tl.arange(0, ROWS), some)
    index = _slot_of(contenders, i_r, n, index, some)
    start, stop = document_of(documents, n, i_r // heads, slot, some)
    end = tl.maximum(slot, index + widening.window) if widening.union else slot + widening.window
    end = tl.where(index - start < widening.sinks, stop, tl.minimum(end, stop))
    tl.store(p_ends + i_r * n + index, end, mask=some)
