"""One pass over the vectors of a layout: bits, what is known of every key tile, and counts from which the host can decide.

A program reads `CHUNK` keys and as many distances. What concerns a whole head is left as one number per program, for the next
kernels to add up, so that nothing has to be cleared before and nothing depends on the order of programs.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.triton.bits import TAIL
from attnsieve.backends.triton.common import LISTED_ALL, LISTED_FLAGGED
from attnsieve.launching import launch
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

CHUNK = 2048
# A key tile holding this share of keys that no row drops is visited; below it they are listed.
_DENSE_SHARE = tl.constexpr(0.75)
_FOREVER = tl.constexpr(FOREVER)
# Rows of `Survey.found`.
WINDOW, SLACK, FLAGGED, OFFSETS, BY_LIST, BY_TILE = range(6)
_FOUND = 6


class Survey(NamedTuple):
    """What is known of keys, key tiles and distances, [Z, H, ...] each.

    latest, earliest, listed int32 [.., B]: of the keys of a tile, the latest end among those that tiles serve, the earliest end of
    all, the latest end among those that lists serve; 0 for none.
    columns, flagged, offsets int32 [.., words]: a bit for each key that no row drops, each of these that lists serve, and each
    distance kept by `offset`; the last two or None.
    found int64 [6, Z, H, programs]: per program WINDOW, the longest life of a key that some row drops; SLACK, how much shorter than
    the layout is the shortest life that ends in it; the number of FLAGGED keys and of OFFSETS; and how many keys all query tiles
    together read of those that some row drops, one by one (BY_LIST) or tile by tile (BY_TILE).
    """

    latest: Tensor
    earliest: Tensor
    listed: Tensor
    columns: Tensor
    flagged: Tensor | None
    offsets: Tensor | None
    found: Tensor


def survey(layout: Layout, positions: int, keys: int, listed: int) -> Survey:
    """For query tiles of `positions` and key tiles of `keys` tokens. listed: LISTED_FLAGGED to flag isolated keys that no row drops."""
    sides, n = layout.end.shape[:2], layout.length
    words = (-(-n // 128) * 128 + TAIL.value) // 32
    programs = -(-words * 32 // CHUNK)
    new = lambda *shape, dtype=torch.int32: torch.empty(*shape, dtype=dtype, device=layout.device)  # noqa: E731
    latest, earliest, in_lists = (new(*sides, -(-n // keys)) for _ in range(3))
    flagged = new(*sides, words) if listed == LISTED_FLAGGED.value else None
    offsets = None if layout.offset is None else new(*sides, words)
    found = new(_FOUND, *sides, programs, dtype=torch.int64)
    result = Survey(latest, earliest, in_lists, new(*sides, words), flagged, offsets, found)
    offset = None if layout.offset is None else layout.offset.contiguous().view(torch.uint8)
    grid, numbers = (programs, sides.numel()), (n, words, positions, keys, listed, CHUNK)
    launch(_survey_kernel, grid, layout.end.contiguous(), offset, result, *numbers, num_warps=8)
    return result


@triton.jit
def _survey_kernel(
    p_end, p_offset, result, n, words, M: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr, CHUNK: tl.constexpr
):
    o_zh = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * (CHUNK // N) + tl.arange(0, CHUNK // N)
    j = tile[:, None] * N + tl.arange(0, N)[None, :]
    ok = j < n
    end = tl.load(p_end + o_zh * n + j, mask=ok, other=0)
    forever = end == _FOREVER
    kept = tl.where(end > j, end, 0)
    p_bits = o_zh * words
    _store_bits(result.columns + p_bits, forever, words, CHUNK)
    in_list = forever & (LISTED == LISTED_ALL)
    if LISTED == LISTED_FLAGGED:
        sparse = tl.sum(forever.to(tl.int32), 1) < _DENSE_SHARE * N
        in_list = forever & sparse[:, None]
        _store_bits(result.flagged + p_bits, in_list, words, CHUNK)
    if LISTED == LISTED_ALL:
        in_list = ok
    o_tiles = o_zh * tl.cdiv(n, N)
    inside = tile * N < n
    tl.store(result.latest + o_tiles + tile, tl.max(tl.where(in_list, 0, kept), 1), mask=inside)
    tl.store(result.earliest + o_tiles + tile, tl.min(end, 1), mask=inside)
    tl.store(result.listed + o_tiles + tile, tl.max(tl.where(in_list, kept, 0), 1), mask=inside)
    _store_found(result, p_offset, o_zh, tile, j, ok, end, forever, in_list, n, words, M, N, CHUNK)


@triton.jit
def _store_found(
    result, p_offset, o_zh, tile, j, ok, end, forever, in_list, n, words, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr
):
    p_found = result.found + o_zh * tl.num_programs(0) + tl.program_id(0)
    s_found = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    mortal = ok & (forever == 0)
    life = tl.where(mortal, tl.minimum(tl.maximum(end - j, 0), n), 0)
    tl.store(p_found, _max(life))
    tl.store(p_found + s_found, _max(tl.where(mortal & (end < n), n - life, 0)))
    tl.store(p_found + 2 * s_found, _sum(in_list.to(tl.int32)))
    if p_offset is not None:
        offset = tl.load(p_offset + o_zh * n + j, mask=ok, other=0) != 0
        _store_bits(result.offsets + o_zh * words, offset, words, CHUNK)
        tl.store(p_found + 3 * s_found, _sum(offset.to(tl.int32)))
    last = tl.where(mortal, tl.minimum(end, n), 0)
    tl.store(p_found + 4 * s_found, _sum(_query_tiles(j, last, M).to(tl.int64)))
    tl.store(p_found + 5 * s_found, tl.sum(_query_tiles(tile * N, tl.max(last, 1), M).to(tl.int64) * N, 0))


@triton.jit
def _query_tiles(first, stop, M: tl.constexpr):
    """How many query tiles have rows in [first, stop)."""
    return tl.where(stop > first, (stop - 1) // M - first // M + 1, 0)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _store_bits(p_words, flags, words, CHUNK: tl.constexpr):
    """The flags [CHUNK in all] of this program as words, the first one in the lowest bit."""
    bit = tl.arange(0, 32)
    word = tl.sum(tl.reshape(flags.to(tl.int32), [CHUNK // 32, 32]) << bit[None, :], 1)
    at = tl.program_id(0) * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    tl.store(p_words + at, word, mask=at < words)
