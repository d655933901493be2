"""Kernels that list single keys per query tile: all that `end` keeps, or those of blocks narrower than long."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnsieve.backends.triton.common import Lists
from attnsieve.backends.triton.lists import place
from attnsieve.launching import launch
from attnsieve.layout import Blocks, Layout


class BlockKeys(NamedTuple):
    """The lists of `attnsieve.layout.Blocks`: count int32 [Z, H, nb], index int32 [Z, H, nb, room]."""

    count: Any
    index: Any
    room: Any


class KeyLists(NamedTuple):
    """Lists of single keys (`common.Lists`) and, where lists of shorter tiles are to be made of them, the end of each listed key."""

    start: Any
    whole: Any
    count: Any
    items: Any
    ends: Any


def block_lists(layout: Layout, blocks: Blocks, positions: int, spare: int) -> Lists:
    """The keys of every row of blocks, those that all its rows keep by nothing else first; query tiles must divide the rows.

    Followed by `spare` entries.
    """
    rows, tiles = blocks.index.shape[2], -(-layout.length // positions)
    start = layout.end.new_empty(*blocks.index.shape[:2], tiles, dtype=torch.int64)
    count = torch.empty_like(start, dtype=torch.int32)
    items = layout.end.new_empty(blocks.index.numel() * blocks.keys + spare)
    lists = Lists(start, torch.empty_like(count), count, items)
    source = BlockKeys(blocks.count.contiguous(), blocks.index.contiguous(), blocks.index.shape[3])
    ends = layout.end.expand(*blocks.index.shape[:2], -1).contiguous()
    grid, numbers = (rows, blocks.index.shape[:2].numel()), (layout.length, rows, tiles, blocks.rows, blocks.keys, positions)
    launch(list_block_keys, grid, source, ends, lists, *numbers, layout.offset is None, STEP=1024)
    return lists


@triton.jit
def count_lasting(mask, p_count, STEP: tl.constexpr):
    """How many keys of a tile of STEP rows are kept by the row after it."""
    t, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = t * STEP + tl.arange(0, STEP)
    end = tl.load(mask.ends + o_zh * mask.n + j, mask=j < mask.n, other=0)
    tl.store(p_count + o_zh * tl.num_programs(0) + t, tl.sum((end > (t + 1) * STEP).to(tl.int32), 0))


@triton.jit
def list_lasting(mask, lists, STEP: tl.constexpr):
    """List them, behind those of earlier tiles, whose number is a tile's count; lists.whole: how many each tile has."""
    t, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_list = o_zh * tl.num_programs(0)
    earlier = tl.zeros([256], tl.int32)
    for x in range(0, t, 256):
        tile = x + tl.arange(0, 256)
        earlier += tl.load(lists.whole + o_list + tile, mask=tile < t, other=0)
    n_before = tl.sum(earlier, 0)
    j = t * STEP + tl.arange(0, STEP)
    end = tl.load(mask.ends + o_zh * mask.n + j, mask=j < mask.n, other=0)
    lasts = end > (t + 1) * STEP
    at = o_zh * mask.n + n_before + tl.cumsum(lasts.to(tl.int32), 0) - 1
    tl.store(lists.items + at, j, mask=lasts)
    tl.store(lists.ends + at, end, mask=lasts)
    tl.store(lists.start + o_list + t, o_zh * mask.n)
    tl.store(lists.count + o_list + t, n_before)


@triton.jit
def _sort_keys(mask, parent, o_zh, o_parent, x, n_parent, n_all, i0, i1, sort, OWN: tl.constexpr):
    """Of a parent's entries x and, with OWN, the tile's own keys behind them: keys and their ends, whether rows i0 .. i1 - 1 all keep
    them (never without `sort`), whether some do."""
    ok = x < n_all
    if parent is None:
        j = x
        end = tl.load(mask.ends + o_zh * mask.n + x, mask=ok, other=0)
    else:
        listed = x < n_parent
        j = tl.load(parent.items + o_parent + x, mask=listed, other=0)
        end = tl.load(parent.ends + o_parent + x, mask=listed, other=0)
        if OWN:
            j = tl.where(listed, j, i0 + x - n_parent)
            end += tl.load(mask.ends + o_zh * mask.n + j, mask=ok & (listed == 0), other=0)
    alive = ok & (j < i1) & (end > tl.maximum(i0, j))
    whole = alive & (j <= i0) & (end >= i1) & sort
    return j, end, whole, alive & (whole == 0)


@triton.jit
def _copy_keys(p_from, p_to, count, STEP: tl.constexpr):
    """Copy the first keys of one list to the beginning of another."""
    for x0 in range(0, count, STEP):
        x = x0 + tl.arange(0, STEP)
        tl.store(p_to + x, tl.load(p_from + x, mask=x < count, other=0), mask=x < count)


@triton.jit
def list_keys(
    mask,
    parent,
    lists,
    marks,
    room,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    DROP: tl.constexpr,
    COPY: tl.constexpr,
    STEP: tl.constexpr,
):
    """The keys that some row of a query tile keeps by `end`; those that every row keeps come first.

    They are found among all keys; or among those of the parent's tile, RATIO times as long; or, with RATIO 1, among the parent's,
    which lie before this tile, and the tile's own. Both parts are ascending, but for what is copied of a longer tile and comes
    first. In a tile that touches the corner no key is whole; with DROP it lists nothing, since its key tiles serve all pairs.
    """
    t, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i0 = t * M
    i1 = tl.minimum(i0 + M, mask.n)
    o_list = o_zh * tl.num_programs(0) + t
    n_parent, o_parent, fixed = i1, tl.cast(0, tl.int64), 0
    n_all = n_parent
    if parent is not None:
        o_root = o_zh * tl.cdiv(mask.n, M * RATIO) + t // RATIO
        n_parent = tl.load(parent.count + o_root)
        o_parent = tl.load(parent.start + o_root)
        n_all = n_parent + (i1 - i0 if RATIO == 1 else 0)
        if RATIO > 1:
            # Whole in the longer tile, so in this one. A multiple of 16, as lists begin at, is copied several keys at a time.
            o_parent = tl.multiple_of(o_parent, 16)
            fixed = tl.load(parent.whole + o_root) // 16 * 16
    sort = True
    if mask.corner is not None:
        sort = i0 >= tl.load(mask.corner_rows + o_zh % H)
        fixed = tl.where(sort, fixed, 0)
        if DROP:
            n_all = tl.where(sort, n_all, 0)
    p_items = lists.items + o_list * room
    if parent is not None and RATIO > 1:
        _copy_keys(parent.items + o_parent, p_items, fixed, COPY)
    n_whole = fixed
    for x0 in range(fixed, n_all, STEP):
        x = x0 + tl.arange(0, STEP)
        _, _, whole, _ = _sort_keys(mask, parent, o_zh, o_parent, x, n_parent, n_all, i0, i1, sort, RATIO == 1)
        n_whole += tl.sum(whole.to(tl.int32), 0)
    at_whole = fixed
    at_part = n_whole
    for x0 in range(fixed, n_all, STEP):
        x = x0 + tl.arange(0, STEP)
        j, end, whole, part = _sort_keys(mask, parent, o_zh, o_parent, x, n_parent, n_all, i0, i1, sort, RATIO == 1)
        if lists.ends is not None:
            place(lists.ends + o_list * room, end, whole, part, at_whole, at_part, room)
        at_whole, at_part = place(p_items, j, whole, part, at_whole, at_part, room)
    tl.store(lists.start + o_list, o_list * room)
    tl.store(lists.whole + o_list, n_whole)
    tl.store(lists.count + o_list, at_part)
    if marks is not None:
        # The keys were written by other threads of this program.
        tl.debug_barrier()
        p_words = marks.words + o_list * marks.chunks * M
        _mark_rows(mask.ends + o_zh * mask.n, p_items, p_words, i0, n_whole, at_part, M, N)


@triton.jit
def _mark_rows(p_ends, p_items, p_words, i0, n_whole, n_listed, M: tl.constexpr, N: tl.constexpr):
    """Words int64 [chunks, M] for the chunks of N keys of a tile's list that not all rows keep: bit c of row r says whether the row
    keeps the chunk's key c."""
    # A thread holds a row and several keys, and adds up their bits. 32 keys at a time: 64 bits take twice as long.
    PART: tl.constexpr = N if N < 32 else 32
    i = i0 + tl.arange(0, M)[None, :]
    c = tl.arange(0, PART)[:, None]
    low = n_whole // N * N
    for x in range(low, n_listed, N):
        words = tl.zeros([M], tl.int64)
        for part in tl.static_range(N // PART):
            o = x + part * PART + c
            j = tl.load(p_items + o, mask=o < n_listed, other=2**30)
            end = tl.load(p_ends + j, mask=o < n_listed, other=0)
            bits = tl.sum(((j <= i) & (i < end)).to(tl.int32) << c, 0)
            words |= (bits.to(tl.int64) & 0xFFFFFFFF) << (part * PART)
        tl.store(p_words + (x - low) // N * M + tl.arange(0, M), words)


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
