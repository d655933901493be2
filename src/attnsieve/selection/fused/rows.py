"""Probed queries as the kernels read them, and K: packing, tile shapes, loads.

Names: y a probed position, g a head of a KV group, r = y * G + g a row, j a key. A "part" is a token of an antidiagonal square:
a row is then PARTS queries and a key PARTS keys whose products are added up; else PARTS is 1.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.device import padded
from attnsieve.selection.sequence import SequenceQK

LOG2E = 1.4426950408889634
# Key tiles that one program goes through.
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
        """The queries at positions `rows`, int32 or int64 [Y]; those that are not fresh, bool [Y], read nothing."""
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
    return grouped.index_select(2, rows - sequence.first_row if sequence.first_row else rows)


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
        width = padded(q.shape[-1]) * q.element_size()
        most, keys, stages = (128, 64, 3) if width <= 256 else (64, 64, 3)
        if q.shape[3] > 1:
            keys, stages = 128 * most // 64, 2
        if q.dtype == torch.float32:  # multiplied without matrix units, in registers
            most, keys, stages = 32, 32, 2
        return cls(min(most, padded(rows)), keys, stages)


class Shape(NamedTuple):
    """What every kernel is specialised on: G heads of a group, PARTS tokens of a row and of a key, their width, padded too."""

    G: Any
    PARTS: Any
    D: Any
    DP: Any
    PRECISION: Any


def shape_of(q: Tensor) -> Shape:
    """For q [S, K, Y, PARTS, G, D]. float32 inputs are multiplied in float32, not in tf32."""
    return _shape(q.shape[4], q.shape[3], q.shape[5], "ieee" if q.dtype == torch.float32 else "tf32")


@lru_cache(maxsize=64)
def _shape(group: int, parts: int, width: int, precision: str) -> Shape:
    return Shape._make(map(tl.constexpr, (group, parts, width, padded(width), precision)))


@triton.jit
def head_of(keys, i_sk, KV: tl.constexpr):
    """Address of K of sequence and KV head i_sk."""
    return keys.p + (i_sk // KV).to(tl.int64) * keys.s_sequence + (i_sk % KV).to(tl.int64) * keys.s_head


@triton.jit
def load_rows(p_q, y, g, ok, part, shape):
    """[rows, DP] of packed queries."""
    o_d = tl.arange(0, shape.DP)
    o_row = ((y.to(tl.int64) * shape.PARTS + part) * shape.G + g) * shape.D
    return tl.load(p_q + o_row[:, None] + o_d[None, :], mask=ok[:, None] & (o_d < shape.D)[None, :], other=0.0)


@triton.jit
def load_keys(p_k, keys, j, ok, part, shape):
    """[keys, DP] of K."""
    o_d = tl.arange(0, shape.DP)
    token = j.to(tl.int64) * shape.PARTS + part
    ok = ok & (token < keys.tokens)
    return tl.load(p_k + token[:, None] * keys.s_token + o_d[None, :], mask=ok[:, None] & (o_d < shape.D)[None, :], other=0.0)
