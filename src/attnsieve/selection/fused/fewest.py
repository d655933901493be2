"""The fewest entries that hold a share of their row's sum, without sorting: a search for the least entry that is kept.

Entries are not negative, so that their bits ascend as they do. An entry is kept if those above it hold less than asked; of equal
entries the first ones. Sums run in float32 in a fixed order.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.device import multiprocessors
from attnsieve.launching import launch

# Rows up to this width stay in registers during the search.
MOST_IN_REGISTERS = 1 << 13
# Entries that a warp looks at together: 8 a thread.
PER_WARP = 1 << 8


@triton.jit
def _store_kept(p_kept, o, w, ok, least, above, target, ties):
    """Flags of one stretch: all entries above the least one kept, of its equals those before which less than asked is kept."""
    bits = w.to(tl.int32, bitcast=True)
    tie = (bits == least).to(tl.int32)
    rank = ties + tl.cumsum(tie, 0) - tie
    value = tl.cast(least, tl.int32).to(tl.float32, bitcast=True)
    kept = (bits > least) | ((tie == 1) & (above + rank * value < target))
    tl.store(p_kept + o, (kept & (w > 0)).to(tl.uint8), mask=ok)
    return ties + tl.sum(tie, 0)


@triton.jit
def _share_of(share, shares, i_r, per_head, heads):
    """Of row i_r."""
    return share if shares is None else tl.load(shares + i_r // per_head % heads)


@triton.jit
def short_kernel(weights, stops, share, shares, kept, width, blocks, per_head, heads, WIDTH: tl.constexpr):
    """kept uint8 [R, width] of weights float32 [R, width], of which row r counts up to stops[r % blocks]; a row per program. share: of
    a row's sum, unless there are shares, of `heads` heads with `per_head` rows each."""
    i_r = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, WIDTH)
    stop = tl.load(stops + i_r % blocks) if stops is not None else width
    w = tl.load(weights + i_r * width + o, mask=o < stop, other=0.0)
    bits = w.to(tl.int32, bitcast=True)
    target = tl.sum(w, 0) * _share_of(share, shares, i_r, per_head, heads)
    # What is above `low` suffices, what is above `high` does not.
    low, high = -1, tl.max(bits, 0)
    while low + 1 < high:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits > middle, w, 0.0), 0) >= target
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above = tl.sum(tl.where(bits > high, w, 0.0), 0)
    _store_kept(kept + i_r * width, o, w, o < width, high, above, target, 0)


@triton.jit
def _sums_above(p_row, stop, limits, WAYS: tl.constexpr, STEP: tl.constexpr):
    """float32 [WAYS]: the sum of a row's entries whose bits are above each limit."""
    sums = tl.zeros([WAYS, STEP], tl.float32)
    for start in tl.range(0, stop, STEP, num_stages=3):
        o = start + tl.arange(0, STEP)
        w = tl.load(p_row + o, mask=o < stop, other=0.0)
        sums += tl.where(w.to(tl.int32, bitcast=True)[None, :] > limits[:, None], w[None, :], 0.0)
    return tl.sum(sums, 1)


@triton.jit
def _limits(low, high, way, WAYS: tl.constexpr):
    """Between low and high, evenly."""
    return tl.minimum(low + (high - low + WAYS) // (WAYS + 1) * (way + 1), high)


@triton.jit
def _narrowed(low, high, limits, enough):
    """The neighbours among the limits of the least entry kept: what is above the first suffices, above the second not."""
    new_low = tl.maximum(low, tl.max(tl.where(enough, limits, low), 0))
    return new_low, tl.minimum(high, tl.min(tl.where(enough, high, limits), 0))


@triton.jit
def _collect(p_row, p_candidates, stop, low, high, STEP: tl.constexpr):
    """Copy a row's entries above low and up to high, those of each lane behind each other, with zeros up to as many as the longest
    lane has; where they end, and the sum of what is above high."""
    lane = tl.arange(0, STEP)
    above = tl.zeros([STEP], tl.float32)
    count = tl.zeros([STEP], tl.int32)
    for start in tl.range(0, stop, STEP, num_stages=3):
        w = tl.load(p_row + start + lane, mask=start + lane < stop, other=0.0)
        bits = w.to(tl.int32, bitcast=True)
        above += tl.where(bits > high, w, 0.0)
        chosen = (bits > low) & (bits <= high) & (start + lane < stop)
        tl.store(p_candidates + count * STEP + lane, w, mask=chosen)
        count += chosen.to(tl.int32)
    most = tl.max(count, 0)
    for step in range(tl.min(count, 0), most):
        tl.store(p_candidates + step * STEP + lane, 0.0, mask=step >= count)
    return most * STEP, tl.sum(above, 0)


@triton.jit
def _sum_above(p_row, stop, least, STEP: tl.constexpr):
    """The sum of a row's entries whose bits are above `least`, and how many there are of these."""
    above = tl.zeros([STEP], tl.float32)
    ties = tl.zeros([STEP], tl.int32)
    for start in tl.range(0, stop, STEP, num_stages=3):
        o = start + tl.arange(0, STEP)
        w = tl.load(p_row + o, mask=o < stop, other=0.0)
        bits = w.to(tl.int32, bitcast=True)
        above += tl.where(bits > least, w, 0.0)
        ties += (bits == least).to(tl.int32)
    return tl.sum(above, 0), tl.sum(ties, 0)


@triton.jit
def long_kernel(
    weights,
    stops,
    share,
    shares,
    candidates,
    kept,
    width,
    room,
    blocks,
    per_head,
    heads,
    WAYS: tl.constexpr,
    STEP: tl.constexpr,
):
    """As `short_kernel` with rows in memory, which are read four times: twice WAYS limits are tried, what is left between two of
    them is searched in `candidates`, float32 [R, room]. Entries from a row's stop up to the next multiple of 4 are 0."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row, p_candidates = weights + i_r * width, candidates + i_r * room
    # A multiple of 4 to the compiler too, which then loads four at a time.
    stop = tl.minimum(tl.cdiv(tl.load(stops + i_r % blocks), 4) * 4, width) if stops is not None else width
    way = tl.arange(0, WAYS)
    # First powers of 4 from 2^-16 on, among which the least sum of probabilities kept is likely; the first way sums everything.
    limits = tl.where(way == 0, -1, (109 + 2 * way) << 23)
    sums = _sums_above(p_row, stop, limits, WAYS, STEP)
    target = tl.max(sums, 0) * _share_of(share, shares, i_r, per_head, heads)
    low, high = _narrowed(-1, 0x7F800000, limits, sums >= target)
    limits = _limits(low, high, way, WAYS)
    low, high = _narrowed(low, high, limits, _sums_above(p_row, stop, limits, WAYS, STEP) >= target)
    end, above = _collect(p_row, p_candidates, stop, low, high, STEP)
    # Candidates were written by other threads than those that read them.
    tl.debug_barrier()
    while low + 1 < high:
        limits = _limits(low, high, way, WAYS)
        enough = above + _sums_above(p_candidates, end, limits, WAYS, STEP) >= target
        low, high = _narrowed(low, high, limits, enough)
    more, ties = _sum_above(p_candidates, end, high, STEP)
    above += more
    value = tl.cast(high, tl.int32).to(tl.float32, bitcast=True)
    if above + (ties - 1) * value < target:
        # All of the equal ones are kept, mostly one.
        for start in tl.range(0, width, STEP, num_stages=3):
            o = start + tl.arange(0, STEP)
            w = tl.load(p_row + o, mask=o < stop, other=0.0)
            flag = (w.to(tl.int32, bitcast=True) >= high) & (w > 0)
            tl.store(kept + i_r * width + o, flag.to(tl.uint8), mask=o < width)
    else:
        before = 0
        for start in tl.range(0, width, STEP, num_stages=3):
            o = start + tl.arange(0, STEP)
            w = tl.load(p_row + o, mask=o < stop, other=0.0)
            before = _store_kept(kept + i_r * width, o, w, o < width, high, above, target, before)


def fewest_with_mass(weights: Tensor, share: float | Tensor, stops: Tensor | None = None) -> Tensor:
    """bool like weights, float32 [..., B, W]: the fewest entries whose sum reaches `share` of the row's; float32 [C] for weights
    [S, C, ..., W]. stops: int32 [B], the entries of a row that count; those up to the next multiple of 4 are 0, those beyond are not
    read."""
    weights, width = weights.contiguous(), weights.shape[-1]
    kept = torch.empty_like(weights, dtype=torch.uint8)
    rows = weights.numel() // width
    alike, shares = (0.0, share) if isinstance(share, Tensor) else (share, None)
    heads = 1 if shares is None else len(shares)
    per_head = rows // (weights.shape[0] * heads)
    sizes = (width, 1 if stops is None else len(stops), per_head)
    if width <= MOST_IN_REGISTERS:
        size = int(triton.next_power_of_2(width))
        rest = {"WIDTH": size, "num_warps": max(1, size // 1024)}
        launch(short_kernel, (rows,), weights, stops, alike, shares, kept, *sizes, heads, **rest)
    else:
        # Few rows have a multiprocessor each, of many two share one.
        warps = 16 if rows <= multiprocessors(weights.device) else 8
        step = PER_WARP * warps
        room = triton.cdiv(width, step) * step
        candidates = weights.new_empty(rows, room)
        rest = {"WAYS": 8, "STEP": step, "num_warps": warps, "maxnreg": 128}
        launch(long_kernel, (rows,), weights, stops, alike, shares, candidates, kept, width, room, *sizes[1:], heads, **rest)
    return kept.view(torch.bool)
