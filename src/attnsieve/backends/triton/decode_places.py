"""Which keys a decode step reads for a row and a word of heads, and which of the heads keep each: the places of the row.

The places of a row at position p lie in sections one after the other, each padded to whole chunks of N:

    near        keys low .. p, one after the other
    columns     from a list, those below low
    distances   p - d for listed d, unless the key is a column
    blocks      the tokens of the blocks listed for p's row of blocks, for one head after the other
    corner      keys 0 .. p, for heads that have p in their captured corner

A key that an earlier section serves is left out of blocks.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnsieve.backends.triton.decode_rule import STEP

_STEP = tl.constexpr(STEP)


class Sections(NamedTuple):
    """First place of each section after the near one, of the padding after the last, and `low`, the first near key."""

    low: Any
    columns: Any
    distances: Any
    blocks: Any
    corner: Any
    stop: Any


class Row(NamedTuple):
    """A row at position p for the layout heads of word h, the first of which is `head` counted over all sequences.

    plain: word of those that do not have the row in their corner.
    """

    h: Any
    head: Any
    p: Any
    sections: Any
    plain: Any


@triton.jit
def sections_of(rule, h, p, shape):
    """Sections of word h, or of several."""
    near = h * 0 + p + 1
    if rule.reach is not None:
        near = tl.minimum(tl.load(rule.reach + h), near)
    low = p + 1 - near
    columns = tl.cdiv(near, shape.N) * shape.N
    distances = columns
    blocks = columns
    if rule.entries is not None:
        o_below = h * rule.steps
        distances += tl.cdiv(tl.load(rule.columns_below + o_below + tl.cdiv(low, _STEP)), shape.N) * shape.N
        blocks = distances + tl.cdiv(tl.load(rule.distances_below + o_below + tl.cdiv(p + 1, _STEP)), shape.N) * shape.N
    corner = blocks
    if rule.block_index is not None:
        corner += tl.cdiv(shape.BITS * rule.block_keys * rule.n_blocks, shape.N) * shape.N
    stop = corner
    if rule.corner is not None:
        stop += tl.where(p < tl.load(rule.corner_stop + h), tl.cdiv(p + 1, shape.N) * shape.N, 0)
    return Sections(low, columns, distances, blocks, corner, stop)


@triton.jit
def _kept(rule, row, j, ok, shape):
    """Words of the heads that keep keys j where `ok`, outside corners and blocks; and those by key alone."""
    distance = row.p - j
    bits = j * 0
    by_key = j * 0
    if rule.by_distance is not None:
        bits = tl.load(rule.by_distance + row.h * rule.far + distance, mask=ok & (distance < rule.far), other=0)
        if rule.by_key is not None:
            by_key = tl.load(rule.by_key + row.h * rule.n + j, mask=ok, other=0)
    else:
        for r in tl.static_range(shape.BITS):
            o_zh = row.head + r
            keep = row.p < tl.load(rule.end + o_zh * rule.n + j, mask=ok, other=0)
            if rule.offset is not None:
                keep = keep | (tl.load(rule.offset + o_zh * rule.n + distance, mask=ok, other=0) != 0)
            bits |= tl.where(keep, 1 << r, 0)
    return bits | by_key, by_key


@triton.jit
def _corner_bits(rule, row, j, ok, shape):
    """Words of the heads that have the row in their corner and keep keys j there, where `ok`."""
    bits = j * 0
    for r in tl.static_range(shape.BITS):
        h = row.h * shape.BITS + r
        inside = ok & (row.p < tl.load(rule.corner_rows + h))
        p_byte = rule.corner + (h * rule.corner_side + row.p).to(tl.int64) * rule.corner_bytes + (j >> 3)
        byte = tl.load(p_byte, mask=inside, other=0).to(tl.int32)
        bits |= ((byte >> (j & 7)) & 1) << r
    return bits


@triton.jit
def plain_heads(rule, h, p, shape):
    """Word of the heads that have p beyond their corner."""
    word = h * 0 - 1
    if rule.corner is not None:
        for r in tl.static_range(shape.BITS):
            word -= (p < tl.load(rule.corner_rows + h * shape.BITS + r)).to(tl.int32) << r
    return word


@triton.jit
def row_places(rule, row, x, shape):
    """See `shares`; x is the first place of a chunk, all of one section."""
    at = row.sections
    u = x + tl.arange(0, shape.N)
    j = at.low + u
    last = row.p
    is_distance, is_block, is_corner = False, x >= at.blocks, x >= at.corner
    if rule.entries is not None:
        is_column = (x >= at.columns) & (x < at.distances)
        is_distance = (x >= at.distances) & (x < at.blocks)
        o_entry = row.h * rule.room + tl.where(is_column, -at.columns, rule.room_columns - at.distances)
        entry = tl.load(rule.entries + o_entry + u, mask=(is_column | is_distance) & (u >= 0), other=0)
        j = tl.where(is_column, entry, tl.where(is_distance, row.p - entry, j))
        last = tl.where(is_column, at.low - 1, row.p)
    if rule.block_index is not None:
        room = rule.block_keys * rule.n_blocks
        r = (u - at.blocks) // room
        place = (u - at.blocks) % room
        p_index = rule.block_index + ((row.head + r) * rule.block_rows + row.p // rule.block_side) * rule.n_blocks
        index = tl.load(p_index + place // rule.block_keys, mask=is_block & (r < shape.BITS), other=-1)
        j = tl.where(is_block, index * rule.block_keys + place % rule.block_keys, j)
    if rule.corner is not None:
        j = tl.where(is_corner, u - at.corner, j)
    ok = (j >= 0) & (j <= last)
    bits, by_key = _kept(rule, row, j, ok, shape)
    if rule.entries is not None and rule.by_key is not None:
        bits = tl.where(is_distance & (by_key != 0), 0, bits)
    if rule.block_index is not None:
        bits = tl.where(is_block, tl.where(ok, 1 << r, 0) & ~bits, bits)
    if rule.corner is not None:
        bits = tl.where(is_corner, _corner_bits(rule, row, j, ok & is_corner, shape), bits & row.plain)
    if rule.end is not None:
        ok = ok & (bits != 0)
    return j, ok, bits
