"""Kernels that turn a layout's vectors into lists of key tiles per query tile, or the reverse."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnsieve.backends.triton.common import (
    LISTED_FLAGGED,
    LISTED_NOTHING,
    NO_CUT,
)
from attnsieve.backends.triton.vectors import Before


class Summary(NamedTuple):
    """What is known of key tiles, int32 [Z, H, B] each, as in `survey.Survey`; and of distances."""

    latest: Any
    earliest: Any
    listed: Any
    distances: Before | None


@triton.jit
def _pair(summary, mask, o_zh, h, t, b, ok, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """For query tiles t and key tiles b: whether tiles must visit the pair, and whether all of it is kept and served."""
    i0 = t * M
    i1 = tl.minimum(i0 + M, mask.n)
    j0 = b * N
    ok = ok & (j0 < i1)
    o_b = o_zh * tl.cdiv(mask.n, N)
    visit = tl.load(summary.latest + o_b + b, mask=ok, other=0) > i0
    whole = tl.load(summary.earliest + o_b + b, mask=ok, other=0) >= i1
    if summary.distances is not None:
        kept = _distances(summary.distances, mask.n, o_zh, i0, j0, b, ok, M, N)
        visit = visit | (kept > 0)
        whole = whole | (kept == i1 - i0 + N - 1)
    if mask.block_bits is not None:
        some, every = _blocks(mask, o_zh, i0, i1, j0, ok, M, N, BLOCK)
        visit = visit | some
        whole = whole | every
    whole = whole & (j0 + N - 1 <= i0)
    if LISTED != LISTED_NOTHING:
        cut = tl.load(mask.cut + o_zh * mask.tiles + t, mask=ok, other=0)
        clear = tl.load(summary.listed + o_b + b, mask=ok, other=0) <= i0
        whole = whole & ((j0 >= cut) | clear)
    if mask.corner is not None:
        inside = i0 < tl.load(mask.corner_rows + h)
        visit = visit | inside
        whole = whole & (inside == 0)
    return visit & ok, whole & ok


@triton.jit
def _distances(before, n, o_zh, i0, j0, b, ok, M: tl.constexpr, N: tl.constexpr):
    """How many kept distances occur between rows from i0 on and keys from j0 on."""
    STEP: tl.constexpr = M if M < N else N
    o_before = o_zh * before.width
    x = (i0 - j0) // STEP
    cut_off = i0 + M > n
    high = tl.load(before.below + o_before + (x + M // STEP), mask=ok & (cut_off == 0), other=0)
    high += tl.load(before.last + o_zh * tl.cdiv(n, N) + b, mask=ok & cut_off, other=0)
    low = tl.load(before.upto + o_before + (x - N // STEP), mask=ok & (i0 - j0 >= N), other=0)
    return high - low


@triton.jit
def _blocks(mask, o_zh, i0, i1, j0, ok, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Whether some and whether every block that a pair of tiles overlaps is listed."""
    some = j0 * 0 + i0 > mask.n * 2
    every = j0 * 0 + i0 < mask.n * 2
    # Tiles lie at multiples of their sides: one that divides the block's, or the reverse, never straddles more than it must.
    ROWS: tl.constexpr = (M + BLOCK - 1) // BLOCK if M % BLOCK == 0 or BLOCK % M == 0 else (M + BLOCK - 2) // BLOCK + 1
    KEYS: tl.constexpr = (N + BLOCK - 1) // BLOCK if N % BLOCK == 0 or BLOCK % N == 0 else (N + BLOCK - 2) // BLOCK + 1
    for x in tl.static_range(ROWS):
        row = i0 // BLOCK + x
        row_ok = row * BLOCK < i1
        for y in tl.static_range(KEYS):
            key = j0 // BLOCK + y
            inside = row_ok & (key * BLOCK < tl.minimum(j0 + N, mask.n))
            p_word = mask.block_bits + (o_zh * mask.n_blocks + row) * mask.block_words + (key >> 5)
            listed = ((tl.load(p_word, mask=ok & inside, other=0) >> (key & 31)) & 1) != 0
            some = some | (inside & listed)
            every = every & (listed | (inside == 0))
    return some, every


@triton.jit
def _inner(mask, o, M: tl.constexpr, N: tl.constexpr, BY_KEY: tl.constexpr):
    """The inner tiles [low, high) that can be causal for outer tile o: key tiles of a query tile, or the reverse."""
    if BY_KEY:
        return o * N // M, mask.tiles
    else:
        return 0, tl.cdiv(tl.minimum((o + 1) * M, mask.n), N)


@triton.jit
def _ordered(x, o, BY_KEY: tl.constexpr):
    """Query tiles and key tiles of the pairs (inner x, outer o), as vectors of one length."""
    if BY_KEY:
        return x, o + x * 0
    else:
        return o + x * 0, x


@triton.jit
def count_tiles(
    mask,
    summary,
    p_count,
    flagged,
    singles,
    room,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    BY_KEY: tl.constexpr,
    STEP: tl.constexpr,
):
    """Count visited tiles per outer tile. By query tile also the cut: keys below it may be listed, tiles above serve all.

    singles: where to write which part of a head's flagged keys, `room` entries each, a query tile reads: those below its cut.
    """
    o, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = o_zh % H
    low, high = _inner(mask, o, M, N, BY_KEY)
    count = tl.zeros([STEP], tl.int32)
    gap = tl.full([STEP], -1, tl.int32)
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        ok = x < high
        t, b = _ordered(x, o, BY_KEY)
        visit, _ = _pair(summary, mask, o_zh, h, t, b, ok, M, N, BLOCK, LISTED_NOTHING)
        count += visit.to(tl.int32)
        gap = tl.where(ok & (visit == 0), x, gap)
    o_list = o_zh * tl.num_programs(0) + o
    tl.store(p_count + o_list, tl.sum(count, 0))
    if not BY_KEY and LISTED != LISTED_NOTHING:
        cut = (tl.max(gap, 0) + 1) * N if LISTED == LISTED_FLAGGED else NO_CUT
        if mask.corner is not None:
            cut = tl.where(o * M < tl.load(mask.corner_rows + h), 0, cut)
        tl.store(mask.cut + o_list, cut)
        if singles is not None:
            _store_singles(singles, flagged, room, o_zh, o_list, o * M, cut, M, N)


@triton.jit
def _store_singles(singles, flagged, room, o_zh, o_list, i0, cut, M: tl.constexpr, N: tl.constexpr):
    """The part below `cut` of a head's flagged keys: all that rows from i0 on see, and those before it first."""
    STEP: tl.constexpr = M if M < N else N
    p_before = o_zh * flagged.width
    whole = tl.load(flagged.upto + p_before + i0 // STEP, mask=cut > i0, other=0)
    whole += tl.load(flagged.below + p_before + cut // STEP, mask=cut <= i0, other=0)
    last = tl.minimum(tl.minimum(cut, i0 + M) // STEP, flagged.width - 1)
    tl.store(singles.start + o_list, o_zh * room)
    tl.store(singles.whole + o_list, whole)
    tl.store(singles.count + o_list, tl.load(flagged.below + p_before + last))


@triton.jit
def fill_tiles(
    mask,
    summary,
    lists,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    BY_KEY: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the visited tiles of each outer tile, wholly kept ones first, ascending in both parts, and a 0 after the last."""
    o, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = o_zh % H
    o_list = o_zh * tl.num_programs(0) + o
    p_items = lists.items + tl.load(lists.start + o_list)
    low, high = _inner(mask, o, M, N, BY_KEY)
    wholes = tl.zeros([STEP], tl.int32)
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        t, b = _ordered(x, o, BY_KEY)
        visit, whole = _pair(summary, mask, o_zh, h, t, b, x < high, M, N, BLOCK, LISTED)
        wholes += (visit & whole).to(tl.int32)
    n_whole = tl.sum(wholes, 0)
    tl.store(lists.whole + o_list, n_whole)
    at_whole = 0
    at_part = n_whole
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        t, b = _ordered(x, o, BY_KEY)
        visit, whole = _pair(summary, mask, o_zh, h, t, b, x < high, M, N, BLOCK, LISTED)
        at_whole, at_part = place(p_items, x, visit & whole, visit & (whole == 0), at_whole, at_part, 2**31 - 1)
    tl.store(p_items + at_part, 0)


@triton.jit
def place(p_items, x, first, second, at_first, at_second, room):
    """Append x[first] at one end and x[second] at another; returns both ends. x has fewer than 2^15 entries."""
    both = first.to(tl.int32) + (second.to(tl.int32) << 16)
    rank = tl.cumsum(both, 0)
    place = tl.where(first, at_first + (rank & 0xFFFF), at_second + (rank >> 16)) - 1
    tl.store(p_items + place, x, mask=(first | second) & (place < room))
    total = tl.sum(both, 0)
    return at_first + (total & 0xFFFF), at_second + (total >> 16)
