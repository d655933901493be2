"""Probed queries against all keys: the LSE of every row, and the LSE of its part in every block of keys on the way."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch
from attnsieve.selection.fused.rows import (
    LOG2E,
    TILES_AT_ONCE,
    ProbedRows,
    Sides,
    head_of,
    keys_of,
    load_keys,
    load_rows,
    shape_of,
)


class Row(NamedTuple):
    """Rows r of a KV head, positions y and heads g, where `ok`: address of the head's queries, and the last key that each reads."""

    p_q: Any
    y: Any
    g: Any
    r: Any
    ok: Any
    last: Any


@triton.jit
def _scan(
    peak,
    total,
    t,
    q_tile,
    rows,
    p_k,
    keys,
    p_blocks,
    blocks,
    scale,
    shape,
    GUARD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One step of the online sum of exp2 over key tile t, N // SIDE blocks of BLOCK keys; the LSE of each block to memory."""
    o = tl.arange(0, N)
    j = (t * (N // SIDE) + o // SIDE) * BLOCK + o % SIDE
    ok = o % SIDE < BLOCK
    if shape.PARTS == 1:
        s = tl.dot(q_tile, tl.trans(load_keys(p_k, keys, j, ok, 0, shape)), input_precision=shape.PRECISION)
    else:
        s = tl.zeros([M, N], tl.float32)
        for part in tl.range(0, shape.PARTS, num_stages=STAGES):
            q_part = load_rows(rows.p_q, rows.y, rows.g, rows.ok, part, shape)
            k_part = load_keys(p_k, keys, j, ok, part, shape)
            s = tl.dot(q_part, tl.trans(k_part), s, input_precision=shape.PRECISION)
    s *= scale
    if GUARD:
        s = tl.where(ok[None, :] & (j[None, :] <= rows.last[:, None]), s, -float("inf"))
    by_block = tl.reshape(s, [M, N // SIDE, SIDE])
    top = tl.max(by_block, 2)
    # Rows that read nothing of a block have -inf; subtracting 0 instead keeps their sums 0, not NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    sums = tl.sum(tl.exp2(by_block - base[:, :, None]), 2)
    if p_blocks is not None:
        block = t * (N // SIDE) + tl.arange(0, N // SIDE)
        p_own = p_blocks + rows.r.to(tl.int64)[:, None] * blocks + block[None, :]
        tl.store(p_own, base + tl.log2(sums), mask=rows.ok[:, None] & (block < blocks)[None, :])
    new_peak = tl.maximum(peak, tl.max(top, 1))
    new_base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    total = total * tl.exp2(peak - new_base) + tl.sum(sums * tl.exp2(base - new_base[:, None]), 1)
    return new_peak, total


@triton.jit
def lse_kernel(
    q,
    position,
    keys,
    p_lse,
    p_blocks,
    scale,
    rows,
    blocks,
    shape,
    KV: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    """p_lse [S * K, splits, R] over TILES tiles of keys each; p_blocks [S * K, R, blocks] or None. Base 2."""
    i_split, i_sk = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * M + tl.arange(0, M)
    row_ok = r < rows
    y, g = r // shape.G, r % shape.G
    last = tl.load(position + y, mask=row_ok, other=-1)
    p_q = q + i_sk.to(tl.int64) * rows * shape.PARTS * shape.D
    p_k = head_of(keys, i_sk, KV)
    if p_blocks is not None:
        p_blocks += i_sk.to(tl.int64) * rows * blocks
    q_tile = load_rows(p_q, y, g, row_ok, 0, shape)
    own = Row(p_q, y, g, r, row_ok, last)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    STEP: tl.constexpr = N // SIDE * BLOCK
    start = i_split * TILES
    stop = tl.minimum(start + TILES, tl.cdiv(tl.max(last, 0) + 1, STEP))
    # Tiles whose keys all rows read come first and need no predicate.
    n_whole = start
    if SIDE == BLOCK:
        n_whole = tl.maximum(start, tl.minimum(stop, (tl.min(tl.where(row_ok, last, 2**30), 0) + 1) // STEP))
    for guard in tl.static_range(2):
        for t in tl.range(n_whole if guard else start, stop if guard else n_whole, num_stages=STAGES):
            peak, total = _scan(
                peak, total, t, q_tile, own, p_k, keys, p_blocks, blocks, scale, shape, guard, M, N, BLOCK, SIDE, STAGES
            )
    lse = tl.where(total == 0, -float("inf"), peak + tl.log2(total))
    tl.store(p_lse + (i_sk.to(tl.int64) * tl.num_programs(1) + i_split) * rows + r, lse, mask=row_ok)


def row_lse(probed: ProbedRows, k: Tensor, block: int = 0) -> tuple[Tensor, Tensor | None]:
    """float32 [S * K, R], the LSE of every row in base 2, and with `block`, which must be at most `Sides.keys`, that of its part
    in each block of keys, [S * K, R, blocks]: only up to the row's last key, the rest is not written."""
    sides = Sides.of(probed.q, probed.count)
    units = -(-k.shape[2] // probed.q.shape[3])
    size = block or sides.keys
    side = int(triton.next_power_of_2(size))
    tiles = triton.cdiv(units, sides.keys // side * size)
    splits, heads = triton.cdiv(tiles, TILES_AT_ONCE), k.shape[0] * k.shape[1]
    partial = k.new_empty(heads, splits, probed.count, dtype=torch.float32)
    blocks = -(-units // size)
    by_block = k.new_empty(heads, probed.count, blocks, dtype=torch.float32) if block else None
    launch(
        lse_kernel,
        (triton.cdiv(probed.count, sides.rows), splits, heads),
        probed.q,
        probed.position,
        keys_of(k),
        partial,
        by_block,
        probed.scale,
        probed.count,
        blocks,
        shape_of(probed.q),
        KV=k.shape[1],
        TILES=TILES_AT_ONCE,
        STAGES=sides.stages,
        M=sides.rows,
        N=sides.keys,
        BLOCK=size,
        SIDE=side,
        num_warps=8 if sides.rows == 128 else 4,
    )
    lse = partial[:, 0] if splits == 1 else (partial / LOG2E).logsumexp(1) * LOG2E
    return lse, by_block
