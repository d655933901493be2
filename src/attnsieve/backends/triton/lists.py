"""Kernels that turn a layout's vectors into lists: key tiles per query tile (or the reverse), and single keys per query tile."""

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


class Summary(NamedTuple):
    """What is known of key tiles and distances, [Z, H, ...] each.

    latest, earliest, listed int32 [.., B]: of the keys of a tile, the latest end among those that tiles serve, the earliest
    end of all, the latest end among those that lists serve; 0 for none. distances int32 [.., n + 1]: kept offsets below each,
    or None.
    """

    latest: Any
    earliest: Any
    listed: Any
    distances: Any


@triton.jit
def _pair(summary, mask, o_zh, h, t, b, ok, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """For query tiles t and key tiles b: whether tiles must visit the pair, and whether all of it is kept and served."""
    i0 = t * M
    i1 = tl.minimum(i0 + M, mask.n)
    j0 = b * N
    o_b = o_zh * tl.cdiv(mask.n, N)
    visit = tl.load(summary.latest + o_b + b, mask=ok, other=0) > i0
    whole = tl.load(summary.earliest + o_b + b, mask=ok, other=0) >= i1
    if summary.distances is not None:
        p_distances = summary.distances + o_zh * (mask.n + 1)
        low = tl.maximum(i0 - (j0 + N - 1), 0)
        high = tl.maximum(i1 - j0, low)
        kept = tl.load(p_distances + high, mask=ok, other=0) - tl.load(p_distances + low, mask=ok, other=0)
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
    return visit & ok & (j0 < i1), whole & ok


@triton.jit
def _blocks(mask, o_zh, i0, i1, j0, ok, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Whether some and whether every block that a pair of tiles overlaps is listed."""
    some = j0 * 0 + i0 > mask.n * 2
    every = j0 * 0 + i0 < mask.n * 2
    for x in tl.static_range((M + BLOCK - 2) // BLOCK + 1):
        row = i0 // BLOCK + x
        row_ok = row * BLOCK < i1
        for y in tl.static_range((N + BLOCK - 2) // BLOCK + 1):
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
    p_cut,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    BY_KEY: tl.constexpr,
    STEP: tl.constexpr,
):
    """Count visited tiles per outer tile. By query tile also the cut: keys below it may be listed, tiles above serve all."""
    o, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = o_zh % H
    low, high = _inner(mask, o, M, N, BY_KEY)
    count = 0
    gap = -1
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        ok = x < high
        t, b = _ordered(x, o, BY_KEY)
        visit, _ = _pair(summary, mask, o_zh, h, t, b, ok, M, N, BLOCK, LISTED_NOTHING)
        count += tl.sum(visit.to(tl.int32), 0)
        gap = tl.maximum(gap, tl.max(tl.where(ok & (visit == 0), x, -1), 0))
    o_list = o_zh * tl.num_programs(0) + o
    tl.store(p_count + o_list, count)
    if not BY_KEY and LISTED != LISTED_NOTHING:
        cut = (gap + 1) * N if LISTED == LISTED_FLAGGED else NO_CUT
        if mask.corner is not None:
            cut = tl.where(o * M < tl.load(mask.corner_rows + h), 0, cut)
        tl.store(p_cut + o_list, cut)


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
    """Write the visited tiles of each outer tile, wholly kept ones first, ascending in both parts."""
    o, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = o_zh % H
    o_list = o_zh * tl.num_programs(0) + o
    p_items = lists.items + tl.load(lists.start + o_list)
    low, high = _inner(mask, o, M, N, BY_KEY)
    n_whole = 0
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        t, b = _ordered(x, o, BY_KEY)
        visit, whole = _pair(summary, mask, o_zh, h, t, b, x < high, M, N, BLOCK, LISTED)
        n_whole += tl.sum((visit & whole).to(tl.int32), 0)
    tl.store(lists.whole + o_list, n_whole)
    at_whole = 0
    at_part = n_whole
    for x0 in range(low, high, STEP):
        x = x0 + tl.arange(0, STEP)
        t, b = _ordered(x, o, BY_KEY)
        visit, whole = _pair(summary, mask, o_zh, h, t, b, x < high, M, N, BLOCK, LISTED)
        at_whole, at_part = _place(p_items, x, visit & whole, visit & (whole == 0), at_whole, at_part, 2**31 - 1)


@triton.jit
def _place(p_items, x, first, second, at_first, at_second, room):
    """Append x[first] at one end and x[second] at another; returns both ends."""
    rank = tl.where(first, at_first + tl.cumsum(first.to(tl.int32), 0), at_second + tl.cumsum(second.to(tl.int32), 0)) - 1
    tl.store(p_items + rank, x, mask=(first | second) & (rank < room))
    return at_first + tl.sum(first.to(tl.int32), 0), at_second + tl.sum(second.to(tl.int32), 0)


@triton.jit
def _sort_keys(mask, parent, o_zh, p_parent, x, n_parent, i0, i1, sort):
    """Of parent entries x: their keys, whether rows i0 .. i1 - 1 all keep them (never without `sort`), whether some do."""
    ok = x < n_parent
    j = x if parent is None else tl.load(p_parent + x, mask=ok, other=0)
    end = tl.load(mask.ends + o_zh * mask.n + j, mask=ok, other=0)
    alive = ok & (j < i1) & (end > tl.maximum(i0, j))
    whole = alive & (j <= i0) & (end >= i1) & sort
    return j, whole, alive & (whole == 0)


@triton.jit
def list_keys(
    mask,
    parent,
    lists,
    room,
    H: tl.constexpr,
    M: tl.constexpr,
    RATIO: tl.constexpr,
    SORT: tl.constexpr,
    DROP: tl.constexpr,
    STEP: tl.constexpr,
):
    """The keys that some row of a query tile keeps by `end`, ascending; with SORT those that every row keeps come first.

    They are found among the keys of the parent's tile, RATIO times as long, or among all keys. In a tile that touches the
    corner no key is whole; with DROP it lists nothing, since its key tiles serve all pairs.
    """
    t, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i0 = t * M
    i1 = tl.minimum(i0 + M, mask.n)
    o_list = o_zh * tl.num_programs(0) + t
    p_items = lists.items + tl.load(lists.start + o_list)
    if parent is None:
        n_parent = i1
        p_parent = lists.items
    else:
        o_parent = o_zh * tl.cdiv(mask.n, M * RATIO) + t // RATIO
        n_parent = tl.load(parent.count + o_parent)
        p_parent = parent.items + tl.load(parent.start + o_parent)
    sort = SORT
    if mask.corner is not None:
        in_corner = i0 < tl.load(mask.corner_rows + o_zh % H)
        sort = SORT & (in_corner == 0)
        if DROP:
            n_parent = tl.where(in_corner, 0, n_parent)
    n_whole = 0
    if SORT:
        for x0 in range(0, n_parent, STEP):
            _, whole, _ = _sort_keys(mask, parent, o_zh, p_parent, x0 + tl.arange(0, STEP), n_parent, i0, i1, sort)
            n_whole += tl.sum(whole.to(tl.int32), 0)
    at_whole = 0
    at_part = n_whole
    for x0 in range(0, n_parent, STEP):
        j, whole, part = _sort_keys(mask, parent, o_zh, p_parent, x0 + tl.arange(0, STEP), n_parent, i0, i1, sort)
        at_whole, at_part = _place(p_items, j, whole, part, at_whole, at_part, room)
    tl.store(lists.whole + o_list, n_whole)
    tl.store(lists.count + o_list, at_part)
