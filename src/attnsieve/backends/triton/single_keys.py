"""Kernels that list single keys per query tile: all that `end` keeps, or those of blocks narrower than long."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnsieve.backends.triton.lists import place


class BlockKeys(NamedTuple):
    """The lists of `attnsieve.layout.Blocks`: count int32 [Z, H, nb], index int32 [Z, H, nb, room]."""

    count: Any
    index: Any
    room: Any


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
        at_whole, at_part = place(p_items, j, whole, part, at_whole, at_part, room)
    tl.store(lists.whole + o_list, n_whole)
    tl.store(lists.count + o_list, at_part)


@triton.jit
def mark_rows(mask, lists, marks, M: tl.constexpr, N: tl.constexpr):
    """Words int64 [Z, H, tiles, chunks, M] for the chunks of N keys of a tile's list that not all rows keep: bit c of row r says
    whether the row keeps the chunk's key c."""
    t, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_list = o_zh * tl.num_programs(0) + t
    low = tl.load(lists.whole + o_list) // N * N
    high = tl.load(lists.count + o_list)
    p_items = lists.items + tl.load(lists.start + o_list)
    i = t * M + tl.arange(0, M)[:, None]
    c = tl.arange(0, N)[None, :]
    for x in range(low, high, N):
        listed = x + c < high
        j = tl.load(p_items + x + c, mask=listed, other=0)
        end = tl.load(mask.ends + o_zh * mask.n + j, mask=listed, other=0)
        keep = (j <= i) & (i < end)
        words = tl.sum(keep.to(tl.int64) << c.to(tl.int64), 1)
        tl.store(marks.words + (o_list * marks.chunks + (x - low) // N) * M + tl.arange(0, M), words)


@triton.jit
def list_block_keys(
    blocks,
    p_ends,
    lists,
    n,
    rows,
    tiles,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    M: tl.constexpr,
    SORT: tl.constexpr,
    STEP: tl.constexpr,
):
    """The keys of a row of blocks, for all its query tiles; with SORT those come first that all its rows keep by nothing else."""
    row, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_row = o_zh * rows + row
    room = blocks.room * KEYS
    p_index = blocks.index + o_row * blocks.room
    p_items = lists.items + o_row * room
    n_keys = tl.load(blocks.count + o_row) * KEYS
    first = row * ROWS
    n_whole = 0
    if SORT:
        for x0 in range(0, n_keys, STEP):
            _, whole, _ = _block_keys(p_index, p_ends + o_zh * n, x0 + tl.arange(0, STEP), n_keys, first, n, KEYS, SORT)
            n_whole += tl.sum(whole.to(tl.int32), 0)
    at_whole = 0
    at_part = n_whole
    for x0 in range(0, n_keys, STEP):
        j, whole, part = _block_keys(p_index, p_ends + o_zh * n, x0 + tl.arange(0, STEP), n_keys, first, n, KEYS, SORT)
        at_whole, at_part = place(p_items, j, whole, part, at_whole, at_part, room)
    t = row * (ROWS // M) + tl.arange(0, ROWS // M)
    tl.store(lists.start + o_zh * tiles + t, t * 0 + o_row * room, mask=t < tiles)
    tl.store(lists.whole + o_zh * tiles + t, t * 0 + n_whole, mask=t < tiles)
    tl.store(lists.count + o_zh * tiles + t, t * 0 + at_part, mask=t < tiles)


@triton.jit
def _block_keys(p_index, p_ends, x, n_keys, first, n, KEYS: tl.constexpr, SORT: tl.constexpr):
    """Keys x of a row of blocks: which they are, whether rows from `first` on keep them by nothing else, whether they may not."""
    ok = x < n_keys
    j = tl.load(p_index + x // KEYS, mask=ok, other=0) * KEYS + x % KEYS
    real = ok & (j < n)
    whole = real & (j <= first) & SORT
    if SORT:
        whole = whole & (tl.load(p_ends + j, mask=whole, other=0) <= first)
    return j, whole, real & (whole == 0)
