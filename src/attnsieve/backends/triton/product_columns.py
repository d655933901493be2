"""Vectors that the passes of the gradients add to every row or column of a product: a bias of keys, LSE and delta of rows.

The matrix unit adds them, as products with ones over 16 more columns: in the layout of the scores a vector takes 16 registers of
every thread, which these loops do not have. The prefill kernel has them; there a bias is a vector (`bias_of`, `common.scores`).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import Rows, load_rows, rows_of
from attnsieve.launching import launch

# Three columns hold one vector (see `split`).
LSE_COLUMN = tl.constexpr(0)
BIAS_COLUMN = tl.constexpr(3)
DELTA_COLUMN = tl.constexpr(6)
# Stands for a bias of -inf: rows that are no queries have columns of zeros, and 0 * inf is NaN.
_REMOVED = tl.constexpr(-3e38)


def columns_dtype(call: Call) -> torch.dtype:
    """bfloat16 beside half-precision inputs, whatever their range; the interpreter cannot multiply it."""
    return torch.bfloat16 if call.q.is_cuda and call.q.dtype != torch.float32 else torch.float32


def bias_of(call: Call) -> Rows | None:
    """Key bias over scale as float32 [B, Hkv, Tk, 4] with zeros behind it, or None; see `common.scores`."""
    bias = call.key_bias
    if bias is None:
        return None
    batch, heads, slots = bias.shape
    quads = bias.new_empty(batch, heads, slots, 4, dtype=torch.float32)
    grid = (triton.cdiv(slots, 256), batch * heads)
    launch(_quads_kernel, grid, Rows(bias, *bias.stride()), quads, call.scale, heads, slots, STEP=256)
    return rows_of(quads)


def bias_columns(call: Call) -> Rows | None:
    """Key bias over scale as [B, Hkv, Tk, 16] columns, or None; see BIAS_COLUMN."""
    bias = call.key_bias
    if bias is None:
        return None
    batch, heads, slots = bias.shape
    columns = bias.new_empty(batch, heads, slots, 16, dtype=columns_dtype(call))
    grid = (triton.cdiv(slots, 128), batch * heads)
    launch(_bias_kernel, grid, Rows(bias, *bias.stride()), columns, call.scale, heads, slots, STEP=128)
    return rows_of(columns)


def row_columns(call: Call, lse: Tensor, delta: Tensor) -> Tensor:
    """[B, Hq, Tq, 16]: -LSE / scale, ones and -delta, as the kernels of dK and dV read them."""
    columns = lse.new_empty(*lse.shape, 16, dtype=columns_dtype(call))
    launch(_rows_kernel, (triton.cdiv(lse.numel(), 64),), lse, delta, columns, call.scale, lse.numel(), STEP=64)
    return columns


@triton.jit
def indicator(FIRST: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, one=1.0):
    """[SIZE, 16]: ones in the three columns from FIRST on.

    A product with constants makes the matrix unit wait for each instruction; `one` computed at run time avoids that.
    """
    column = tl.arange(0, 16)
    row = tl.where((column >= FIRST) & (column < FIRST + 3), one, 0.0)
    return tl.broadcast_to(row[None, :], [SIZE, 16]).to(DTYPE)


@triton.jit
def split(value, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """[T, 16] of a float32 vector [T]: three columns from FIRST on whose sum it is, as three bfloat16 hold a float32."""
    column = tl.arange(0, 16)
    parts = tl.zeros([value.shape[0], 16], tl.float32)
    for x in tl.static_range(3):
        part = value.to(DTYPE).to(tl.float32)
        parts += tl.where((column == FIRST + x)[None, :], part[:, None], 0.0)
        # Of an infinity nothing is left, inf - inf would be NaN.
        value = tl.where(value == part, 0.0, value - part)
    return parts


@triton.jit
def dot_and_add(a, b, few_a, few_b, PRECISION: tl.constexpr):
    """a b + few_a few_b. In float32 the few come last: they can be large and would cost the products their low bits.

    In half precision that does not show, and first they let the matrix unit run on (else it waits for each instruction).
    """
    if PRECISION == "ieee":
        return tl.dot(few_a, few_b, tl.dot(a, b, input_precision=PRECISION), input_precision=PRECISION)
    else:
        return tl.dot(a, b, tl.dot(few_a, few_b))


@triton.jit
def at_most_0(x):
    """Scores less their row's LSE, in base 2; NaN stays NaN. Beside a bias of e^18 neighbours in float32 lie 8 apart: what rounds to
    more than the LSE would get a weight beyond any bound."""
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def biased(q_tile, k_tile, p_bias, s_bias, j, ok, one, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T + bias / scale, [R, N]."""
    if p_bias is None:
        return tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    else:
        b_tile = load_rows(p_bias, j, s_bias, ok, 16, 16, GUARD)
        ones = indicator(BIAS_COLUMN, q_tile.shape[0], b_tile.dtype, one)
        return dot_and_add(q_tile, tl.trans(k_tile), ones, tl.trans(b_tile), PRECISION)


@triton.jit
def _quads_kernel(bias, p_out, scale, heads, slots, STEP: tl.constexpr):
    """bias / scale [B, H, T] as [B, H, T, 4], zeros behind it."""
    o_bh = tl.program_id(1).to(tl.int64)
    slot, o = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.arange(0, 4)
    p_bias = bias.p + (o_bh // heads) * bias.s_batch + (o_bh % heads) * bias.s_head + slot * bias.s_row
    value = tl.load(p_bias, mask=slot < slots, other=0.0).to(tl.float32) / scale
    quad = tl.where((o == 0)[None, :], value[:, None], 0.0)
    tl.store(p_out + (o_bh * slots + slot)[:, None] * 4 + o[None, :], quad, mask=(slot < slots)[:, None])


@triton.jit
def _bias_kernel(bias, p_out, scale, heads, slots, STEP: tl.constexpr):
    """bias / scale [B, H, T] as columns [B, H, T, 16], beside ones for the LSE."""
    o_bh = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    ok = slot < slots
    p_bias = bias.p + (o_bh // heads) * bias.s_batch + (o_bh % heads) * bias.s_head + slot * bias.s_row
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    value = tl.load(p_bias, mask=ok, other=0.0).to(tl.float32) / scale
    # Not `tl.maximum`: NaN stays NaN.
    columns = split(tl.where(value < _REMOVED, _REMOVED, value), BIAS_COLUMN, DTYPE)
    columns += indicator(LSE_COLUMN, STEP, tl.float32)
    p_part = p_out + (o_bh * slots + slot)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_part, columns.to(DTYPE), mask=ok[:, None])


@triton.jit
def _rows_kernel(p_lse, p_delta, p_columns, scale, rows, STEP: tl.constexpr):
    """Columns [B, Hq, Tq, 16] of -LSE / scale, ones and -delta, as the kernels of dK and dV read them."""
    row = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    ok = row < rows
    lse = tl.load(p_lse + row, mask=ok, other=0.0)
    # Rows that keep nothing: exp2 of a score less this is 0.
    lse = tl.where(lse == -float("inf"), 1e30, lse)
    DTYPE: tl.constexpr = p_columns.dtype.element_ty
    delta = tl.load(p_delta + row, mask=ok, other=0.0)
    columns = split(-lse / scale, LSE_COLUMN, DTYPE) + split(-delta, DELTA_COLUMN, DTYPE)
    columns += indicator(BIAS_COLUMN, STEP, tl.float32)
    tl.store(p_columns + row[:, None] * 16 + tl.arange(0, 16)[None, :], columns.to(DTYPE), mask=ok[:, None])
