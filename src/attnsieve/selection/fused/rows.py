"""Probed queries against all keys: the LSE of every row, and the LSE of its part in every block of keys on the way.

Names: y a probed position, g a head of a KV group, r = y * G + g a row, j a key. A "part" is a token of an antidiagonal square:
a row is then PARTS queries and a key PARTS keys whose products are added up; else PARTS is 1.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.selection.sequence import SequenceQK

LOG2E = 1.4426950408889634
# Key tiles that one program goes through: the same for every batch, so that sums do not depend on it.
TILES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class ProbedRows:
    """q [S, K, Y, PARTS, G, D], copied once: the heads of a group lie side by side, so that they share what is read of K.

    position: int32 [Y], the last key that a row reads; -1 for rows that read none. scale: of the scores, base 2.
    """

    q: Tensor
    position: Tensor
    scale: float

    @classmethod
    def of(cls, sequence: SequenceQK, rows: Tensor, fresh: Tensor | None = None) -> ProbedRows:
        """The queries at positions `rows`, int64 [Y]; those that are not fresh, bool [Y], read nothing."""
        position = rows.int() if fresh is None else torch.where(fresh, rows, -1).int()
        return cls(_of_groups(sequence, rows).unsqueeze(3), position, sequence.scale * LOG2E)

    @classmethod
    def of_squares(cls, sequence: SequenceQK, squares: range, stride: int) -> ProbedRows:
        """Antidiagonals of the squares with these numbers, of `stride` queries each, 0 where the call has no query."""
        first, n, device = sequence.first_row, sequence.tokens, sequence.q.device
        number = torch.arange(squares.start, squares.stop, device=device)
        tokens = number[:, None] * stride + torch.arange(stride, device=device).flip(0)
        q = _of_groups(sequence, tokens.flatten().clamp(first, n - 1)).unflatten(2, (-1, stride))
        if squares.start * stride < first or squares.stop * stride > n:
            q.masked_fill_(((tokens < first) | (tokens >= n))[..., None, None], 0)
        asked = (number >= first // stride) & (number < -(-n // stride))
        return cls(q, torch.where(asked, number, -1).int(), sequence.scale * LOG2E / stride)

    @property
    def group(self) -> int:
        return self.q.shape[4]

    @property
    def count(self) -> int:
        """R: rows of a KV head."""
        return self.q.shape[2] * self.q.shape[4]


def _of_groups(sequence: SequenceQK, rows: Tensor) -> Tensor:
    """[S, K, Y, G, D]."""
    grouped: Tensor = sequence.q.unflatten(1, (sequence.k.shape[1], -1)).transpose(2, 3)
    return grouped.index_select(2, rows - sequence.first_row)


class Keys(NamedTuple):
    """K [S, K, tokens, D] with contiguous last dimension, its strides and its number of tokens."""

    p: Any
    s_sequence: Any
    s_head: Any
    s_token: Any
    tokens: Any


def keys_of(k: Tensor) -> Keys:
    """The bundle of k [S, K, tokens, D], copied first if its last dimension is not contiguous."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    return Keys(k, k.stride(0), k.stride(1), k.stride(2), k.shape[2])


@dataclass(frozen=True)
class Sides:
    """rows x keys scores per program, and how many tiles of keys are in flight."""

    rows: int
    keys: int
    stages: int

    @classmethod
    def of(cls, q: Tensor, rows: int) -> Sides:
        """For `rows` rows of q's width and dtype: two programs fit into an H100's shared memory up to 256 bytes per row, one where
        queries are read again for every key tile, which makes long tiles of keys worth more."""
        width = _padded(q.shape[-1]) * q.element_size()
        most, keys, stages = (128, 64, 3) if width <= 256 else (64, 64, 3)
        if q.shape[3] > 1:
            keys, stages = 128 * most // 64, 2
        if q.dtype == torch.float32:  # multiplied without matrix units, in registers
            most, keys, stages = 32, 32, 2
        return cls(min(most, max(16, triton.next_power_of_2(rows))), keys, stages)


def constants(q: Tensor) -> dict[str, Any]:
    """What every kernel is specialised on, for q [S, K, Y, PARTS, G, D]."""
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"G": q.shape[4], "PARTS": q.shape[3], "D": q.shape[5], "DP": _padded(q.shape[5]), "PRECISION": precision}


def _padded(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


@triton.jit
def head_of(keys, i_sk, KV: tl.constexpr):
    """Address of K of sequence and KV head i_sk."""
    return keys.p + (i_sk // KV).to(tl.int64) * keys.s_sequence + (i_sk % KV).to(tl.int64) * keys.s_head


@triton.jit
def load_rows(p_q, y, g, ok, part, G: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[rows, DP] of packed queries."""
    o_d = tl.arange(0, DP)
    o_row = ((y.to(tl.int64) * PARTS + part) * G + g) * D
    return tl.load(p_q + o_row[:, None] + o_d[None, :], mask=ok[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_keys(p_k, keys, j, ok, part, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[keys, DP] of K."""
    o_d = tl.arange(0, DP)
    token = j.to(tl.int64) * PARTS + part
    ok = ok & (token < keys.tokens)
    return tl.load(p_k + token[:, None] * keys.s_token + o_d[None, :], mask=ok[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _scan(
    peak,
    total,
    t,
    q_tile,
    p_q,
    y,
    g,
    r,
    row_ok,
    last,
    p_k,
    keys,
    p_blocks,
    blocks,
    scale,
    GUARD: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if PARTS == 1:
        s = tl.dot(q_tile, tl.trans(load_keys(p_k, keys, j, ok, 0, 1, D, DP)), input_precision=PRECISION)
    else:
        s = tl.zeros([M, N], tl.float32)
        for part in tl.range(0, PARTS, num_stages=STAGES):
            q_part = load_rows(p_q, y, g, row_ok, part, G, PARTS, D, DP)
            k_part = load_keys(p_k, keys, j, ok, part, PARTS, D, DP)
            s = tl.dot(q_part, tl.trans(k_part), s, input_precision=PRECISION)
    s *= scale
    if GUARD:
        s = tl.where(ok[None, :] & (j[None, :] <= last[:, None]), s, -float("inf"))
    by_block = tl.reshape(s, [M, N // SIDE, SIDE])
    top = tl.max(by_block, 2)
    # Rows that read nothing of a block have -inf; subtracting 0 instead keeps their sums 0, not NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    sums = tl.sum(tl.exp2(by_block - base[:, :, None]), 2)
    if p_blocks is not None:
        block = t * (N // SIDE) + tl.arange(0, N // SIDE)
        p_own = p_blocks + r.to(tl.int64)[:, None] * blocks + block[None, :]
        tl.store(p_own, base + tl.log2(sums), mask=row_ok[:, None] & (block < blocks)[None, :])
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
    KV: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    """p_lse [S * K, splits, R] over TILES tiles of keys each; p_blocks [S * K, R, blocks] or None. Base 2."""
    i_split, i_sk = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * M + tl.arange(0, M)
    row_ok = r < rows
    y, g = r // G, r % G
    last = tl.load(position + y, mask=row_ok, other=-1)
    p_q = q + i_sk.to(tl.int64) * rows * PARTS * D
    p_k = head_of(keys, i_sk, KV)
    if p_blocks is not None:
        p_blocks += i_sk.to(tl.int64) * rows * blocks
    q_tile = load_rows(p_q, y, g, row_ok, 0, G, PARTS, D, DP)
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
                peak,
                total,
                t,
                q_tile,
                p_q,
                y,
                g,
                r,
                row_ok,
                last,
                p_k,
                keys,
                p_blocks,
                blocks,
                scale,
                guard,
                G,
                PARTS,
                D,
                DP,
                PRECISION,
                M,
                N,
                BLOCK,
                SIDE,
                STAGES,
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
    lse_kernel[(triton.cdiv(probed.count, sides.rows), splits, heads)](
        probed.q,
        probed.position,
        keys_of(k),
        partial,
        by_block,
        probed.scale,
        probed.count,
        blocks,
        KV=k.shape[1],
        TILES=TILES_AT_ONCE,
        STAGES=sides.stages,
        M=sides.rows,
        N=sides.keys,
        BLOCK=size,
        SIDE=side,
        **constants(probed.q),
        num_warps=8 if sides.rows == 128 else 4,
    )
    lse = partial[:, 0] if splits == 1 else (partial / LOG2E).logsumexp(1) * LOG2E
    return lse, by_block
