"""`kth_position` on a GPU: the walk of `attnsieve.nn.quantile`, two launches per bit and one scan for the last bits."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
SCAN_BITS = 5  # nodes of 32 positions are scanned by each query: one launch instead of ten
QUERIES = 128


def kth_position(order: Tensor, k: Tensor) -> Tensor:
    """As `attnsieve.nn.quantile.kth_position`; all tensors int32 [R, n] on one GPU."""
    rows, n = order.shape
    order, k = order.contiguous(), k.contiguous()
    tiles = triton.cdiv(n + 1, TILE)
    grid = (tiles, rows)
    rest = torch.minimum(k, torch.arange(-1, n - 1, dtype=torch.int32, device=k.device))
    inside = torch.arange(n, dtype=torch.int32, device=k.device).repeat(rows, 1)
    node, ones, counts = torch.zeros_like(order), order.new_empty(rows, n + 1), order.new_empty(rows, tiles)
    level, spare = order, torch.empty_like(order)
    bits = range((n - 1).bit_length() - 1, SCAN_BITS - 1, -1)
    for bit in bits:
        if bit == bits[0]:
            _count[grid](level, counts, n, bit, tiles, TILE)
        _split[grid](level, spare, ones, counts, n, bit, tiles, TILE, triton.next_power_of_2(tiles))
        level, spare = spare, torch.empty_like(order) if level is order else level
        _step[grid](level, ones, counts, node, inside, rest, n, bit, tiles, TILE)
    rank = torch.empty_like(order).scatter_(
        1, order.long(), torch.arange(n, dtype=torch.int32, device=k.device).expand_as(order)
    )
    _scan[(triton.cdiv(n, QUERIES), rows)](rank, node, rest, n, QUERIES, 1 << SCAN_BITS)
    return node


@triton.jit
def _count(level, counts, n, bit, tiles, TILE: tl.constexpr):
    """One bits per tile of `level`."""
    i_t, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = i_t * TILE + tl.arange(0, TILE)
    value = tl.load(level + i_r * n + o, mask=o < n, other=0)
    tl.store(counts + i_r * tiles + i_t, tl.sum((value >> bit) & 1))


@triton.jit
def _split(level, following, ones, counts, n, bit, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """Write `ones`, the one bits before each index, and the next level: every node's zeros, then its ones."""
    i_t, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = tl.arange(0, TILES)
    before = tl.sum(tl.load(counts + i_r * tiles + o_t, mask=o_t < i_t, other=0))
    o = i_t * TILE + tl.arange(0, TILE)
    value = tl.load(level + i_r * n + o, mask=o < n, other=0)
    one = (value >> bit) & 1
    before += tl.cumsum(one) - one
    tl.store(ones + i_r * (n + 1) + o, before, mask=o <= n)
    half_node = (o >> (bit + 1)) << bit
    target = half_node + tl.where(one == 1, before + (1 << bit), o - before)
    tl.store(following + i_r * n + target, value & ((1 << bit) - 1), mask=o < n)


@triton.jit
def _step(level, ones, counts, node, inside, rest, n, bit, tiles, TILE: tl.constexpr):
    """Send every query into the half that holds its answer; count the one bits of the next level on the way."""
    i_t, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = i_t * TILE + tl.arange(0, TILE)
    ok = o < n
    e = tl.load(node + i_r * n + o, mask=ok, other=0)
    m = tl.load(inside + i_r * n + o, mask=ok, other=0)
    k = tl.load(rest + i_r * n + o, mask=ok, other=0)
    zeros = e + m - tl.load(ones + i_r * (n + 1) + e + m, mask=ok, other=0) - (e >> 1)
    right = k >= zeros
    tl.store(node + i_r * n + o, tl.where(right, e + (1 << bit), e), mask=ok)
    tl.store(inside + i_r * n + o, tl.where(right, m - zeros, zeros), mask=ok)
    tl.store(rest + i_r * n + o, tl.where(right, k - zeros, k), mask=ok)
    value = tl.load(level + i_r * n + o, mask=ok, other=0)
    tl.store(counts + i_r * tiles + i_t, tl.sum((value >> (bit - 1)) & 1))


@triton.jit
def _scan(rank, node, rest, n, QUERIES: tl.constexpr, NODE: tl.constexpr):
    """Replace each query's node by the position in it that is better than the query and has `rest` such before it."""
    i_t, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = i_t * QUERIES + tl.arange(0, QUERIES)
    ok = o < n
    e = tl.load(node + i_r * n + o, mask=ok, other=0)
    k = tl.load(rest + i_r * n + o, mask=ok, other=0)
    position = e[:, None] + tl.arange(0, NODE)[None, :]
    other = tl.load(rank + i_r * n + position, mask=position < n, other=2147483647)
    better = tl.cumsum((other < o[:, None]).to(tl.int32), axis=1)
    skipped = tl.sum((better <= k[:, None]).to(tl.int32), axis=1)
    tl.store(node + i_r * n + o, tl.minimum(e + skipped, n - 1), mask=ok)
