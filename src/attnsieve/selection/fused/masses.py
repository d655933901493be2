"""What blocks of queries ask of keys: the attention of each block's probed rows, summed over them, by key or by block of keys."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch
from attnsieve.selection.fused.lse import row_lse
from attnsieve.selection.fused.rows import (
    TILES_AT_ONCE,
    ProbedRows,
    Sides,
    head_of,
    keys_of,
    load_keys,
    load_rows,
    shape_of,
)


@dataclass(frozen=True)
class Sums:
    """Which rows are added up: `rows` positions each; with `together` all heads of a group, else each head for itself."""

    rows: int
    together: bool


@triton.jit
def keys_kernel(
    q,
    position,
    lse,
    keys,
    out,
    scale,
    rows,
    units,
    X,
    shape,
    KV: tl.constexpr,
    GX: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    U: tl.constexpr,
    XP: tl.constexpr,
    N: tl.constexpr,
):
    """out [S * K, G // GX, B, n]: attention of the X probed positions and GX heads of a unit, by key.

    Keys lie along the rows of the scores and a unit's rows U columns apart: all in the registers of one thread.
    """
    i_split, i_sk = tl.program_id(1), tl.program_id(2)
    GU: tl.constexpr = shape.G // GX
    slot = tl.arange(0, U * XP)
    unit = tl.program_id(0) * U + slot % U
    x = slot // U
    ok = (unit < units) & (x < X * GX)
    y = unit // GU * X + x // GX
    g = unit % GU + x % GX
    last = tl.load(position + y, mask=ok, other=-1)
    row_lse = tl.load(lse + i_sk.to(tl.int64) * rows + y * shape.G + g, mask=ok, other=0.0)
    q_tile = load_rows(q + i_sk.to(tl.int64) * rows * shape.D, y, g, ok, 0, shape)
    p_k = head_of(keys, i_sk, KV)
    u = tl.program_id(0) * U + tl.arange(0, U)
    o_out = (i_sk * GU + u % GU).to(tl.int64) * (units // GU) + u // GU
    p_out = out + o_out[None, :] * keys.tokens
    start = i_split * TILES
    stop = tl.minimum(start + TILES, tl.cdiv(tl.max(last, 0) + 1, N))
    for t in tl.range(start, stop, num_stages=STAGES):
        j = t * N + tl.arange(0, N)
        k_tile = load_keys(p_k, keys, j, j >= 0, 0, shape)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=shape.PRECISION) * scale
        shares = tl.where(j[:, None] <= last[None, :], tl.exp2(s - row_lse[None, :]), 0.0)
        mass = tl.sum(tl.reshape(shares, [N, XP, U]), 1)
        tl.store(p_out + j[:, None], mass, mask=(j < keys.tokens)[:, None] & (u < units)[None, :])


def by_key(probed: ProbedRows, k: Tensor, sums: Sums) -> Tensor:
    """float32 [S, C, B, n] of B = Y / rows blocks of rows: for every block up to the last key that it reads, zeros up to the
    next multiple of 4; beyond that nothing is written."""
    members = probed.group if sums.together else 1
    blocks, most = probed.q.shape[2] // sums.rows, max(1, Sides.of(probed.q, probed.count).rows // members)
    shape = (k.shape[0] * k.shape[1], probed.group // members, blocks, k.shape[2])
    if sums.rows <= most:
        out = k.new_empty(shape, dtype=torch.float32)
        _write_by_key(probed, k, sums.rows, members, out)
        return out.view(k.shape[0], -1, *shape[2:])
    # More rows than a program holds: some of each block after the others.
    total = k.new_zeros(shape, dtype=torch.float32)
    q, position = probed.q.unflatten(2, (blocks, -1)), probed.position.unflatten(0, (blocks, -1))
    for some_q, some in zip(q.split(most, dim=3), position.split(most, dim=1), strict=True):
        rows = ProbedRows(some_q.flatten(2, 3).contiguous(), some.flatten().contiguous(), probed.scale)
        # Not all of it is written: nothing beyond a block's last key among these rows.
        part = torch.zeros_like(total)
        _write_by_key(rows, k, some.shape[1], members, part)
        total += part
    return total.view(k.shape[0], -1, *shape[2:])


def _write_by_key(probed: ProbedRows, k: Tensor, rows: int, members: int, out: Tensor) -> None:
    lse, _ = row_lse(probed, k)
    units, slots = out.shape[1] * out.shape[2], int(triton.next_power_of_2(rows * members))
    sides = Sides.of(probed.q, units * slots)
    at_once = max(1, sides.rows // slots)
    splits = triton.cdiv(triton.cdiv(k.shape[2], sides.keys), TILES_AT_ONCE)
    launch(
        keys_kernel,
        (triton.cdiv(units, at_once), splits, len(out)),
        probed.q,
        probed.position,
        lse,
        keys_of(k),
        out,
        probed.scale,
        probed.count,
        units,
        rows,
        shape_of(probed.q),
        KV=k.shape[1],
        GX=members,
        TILES=TILES_AT_ONCE,
        STAGES=2,
        U=at_once,
        XP=slots,
        N=sides.keys,
        # Four warps, side by side along the keys, leave every unit's rows to one thread.
        num_warps=4,
    )


@triton.jit
def fold_kernel(
    by_block,
    lse,
    position,
    out,
    blocks,
    finer,
    width,
    X,
    KEYS: tl.constexpr,
    G: tl.constexpr,
    GX: tl.constexpr,
    FINER: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [S * K, G // GX, B, width] from the LSE of rows in blocks of KEYS keys, FINER of which make a block of `out`."""
    i_b, i_sk = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    GU: tl.constexpr = G // GX
    rows = blocks * X * G
    o = tl.program_id(0) * STEP + tl.arange(0, STEP)
    for g_u in range(GU):
        mass = tl.zeros([STEP], tl.float32)
        for x in range(X * GX):
            y = i_b * X + x // GX
            r = i_sk * rows + y * G + g_u + x % GX
            last = tl.load(position + y)
            row_lse = tl.load(lse + r)
            for part in tl.static_range(FINER):
                b = o * FINER + part
                read = (b * KEYS <= last) & (o < width)
                share = tl.exp2(tl.load(by_block + r * finer + b, mask=read, other=0.0) - row_lse)
                mass += tl.where(read, share, 0.0)
        tl.store(out + ((i_sk * GU + g_u) * blocks + i_b) * width + o, mass, mask=o < width)


def by_block(probed: ProbedRows, k: Tensor, block: int, sums: Sums) -> Tensor:
    """float32 [S, C, B, nb] of B = Y / rows blocks of rows and blocks of `block` keys (squares, where rows are squares)."""
    most = Sides.of(probed.q, probed.count).keys
    keys = next(size for size in range(min(block, most), 0, -1) if block % size == 0)
    lse, finer = row_lse(probed, k, keys)
    assert finer is not None
    members = probed.group if sums.together else 1
    blocks, width = probed.q.shape[2] // sums.rows, -(-k.shape[2] // (probed.q.shape[3] * block))
    out = k.new_empty(len(lse), probed.group // members, blocks, width, dtype=torch.float32)
    launch(
        fold_kernel,
        (triton.cdiv(width, 256), blocks, len(lse)),
        finer,
        lse,
        probed.position,
        out,
        blocks,
        finer.shape[-1],
        width,
        sums.rows,
        KEYS=keys,
        G=probed.group,
        GX=members,
        FINER=block // keys,
        STEP=256,
        num_warps=4,
    )
    return out.view(k.shape[0], -1, blocks, width)
