"""Prefill of scattered diagonals, pair by pair: each row of a query tile reads the key and the value of its own distance.

Neighbouring diagonals read nearly the same keys, which the first cache keeps. There is nothing here for the matrix unit. A row goes
on from what key tiles have summed up of the rest of its keys, and its weights stay relative to the LSE of that: one step costs a
product and a sum for each number of K and V, and little beside. Where that does not do (a row without other keys, weights beyond
float32, a NaN or infinity in V at a key that the row keeps otherwise or not at all), the tile gets an LSE of NaN, and a second launch
computes it again with an online softmax. In one kernel the second way costs the first one 2 % of its time.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import LN2, LOG2E, Places, Rows, head_base, rows_of, rows_of_tile, span_of
from attnsieve.backends.triton.forward import Prefill
from attnsieve.backends.triton.geometry import Geometry, Tiles, rounding
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.nonfinite import has_nan, is_finite
from attnsieve.backends.triton.outputs import new_outputs
from attnsieve.backends.triton.scattered import Scattered

# Numbers of K that a row takes at a time: 128 bytes, which eight threads hold. More threads per row would repeat more of what is done
# once per pair.
_PART = tl.constexpr(64)
# Less than any row.
_NEVER = tl.constexpr(-(2**31))
_TILES = Tiles(rows=128, keys=64, warps=16, stages=1)


@triton.jit
def _wide(x):
    """float32 numbers; of bfloat16 in one instruction each, where the compiler takes one and a half."""
    if x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _load(p, ok):
    """Numbers in float32, 0 where not ok; all are if that is None."""
    return _wide(tl.load(p) if ok is None else tl.load(p, mask=ok, other=0.0))


@triton.jit
def _dot(q_low, q_high, p_k, at, PARTS: tl.constexpr):
    """Products [R] of rows of q [R, 64], twice where PARTS is 2, with the rows of K at `at`."""
    s = _sums_of_threads(q_low * _load(p_k + at, None))
    if PARTS == 2:
        s += _sums_of_threads(q_high * _load(p_k + _PART + at, None))
    return tl.sum(s, 1)


@triton.jit
def _sums_of_threads(x):
    """Sums [R, 8] of the numbers of a row [R, 64] that one thread holds: both parts are then passed on between threads as one."""
    return tl.sum(tl.reshape(x, [x.shape[0], 8, 8]), 2)


@triton.jit
def _add(low, high, weight, p_v, at, ok, PARTS: tl.constexpr):
    """Sums [R, 64] plus weight [R] times the rows of V at `at`."""
    low += weight[:, None] * _load(p_v + at, ok)
    if PARTS == 2:
        high += weight[:, None] * _load(p_v + _PART + at, ok)
    return low, high


@triton.jit
def _edge_pair(rows, keys, distance, D: tl.constexpr):
    """Of rows some of which a distance leads to before the text: where their keys' rows are, whether they keep them, products."""
    q_low, q_high, i, last = rows
    p_k, _, p_bias, s_bias, p_end = keys
    j = tl.maximum(i - distance, 0)
    keep = (i >= distance) & (tl.load(p_end + j) <= last)
    at = j[:, None] * D + tl.arange(0, _PART)[None, :]
    s = _dot(q_low, q_high, p_k, at, D // _PART)
    if p_bias is not None:
        s += tl.load(p_bias + j * s_bias)
    return at, keep, s


@triton.jit
def _add_relative(low, high, total, base, rows, keys, p_offset, inside, count, scale, D: tl.constexpr):
    """Sums low and high [R, 64] and total [R] with weights relative to base [R] of a head's first `count` diagonals, of which `inside`
    lead no row to before the text. rows: queries [R, 64] in two parts, positions, and the greatest end of keys that rows keep by
    their distance alone; keys: addresses of K, V, the bias with its stride, and ends."""
    PARTS: tl.constexpr = D // _PART
    q_low, q_high, i, last = rows
    p_k, p_v, p_bias, s_bias, p_end = keys
    at = i[:, None] * D + tl.arange(0, _PART)[None, :]
    p_row_end = p_end + i
    distance = tl.load(p_offset)
    for x in tl.range(0, inside, num_stages=1):
        back = distance * D
        keep = tl.load(p_row_end - distance) <= last
        s = _dot(q_low, q_high, p_k - back, at, PARTS)
        if p_bias is not None:
            s += tl.load(p_bias + (i - distance) * s_bias)
        weight = tl.where(keep, tl.exp2(s * scale - base), 0.0)
        low, high = _add(low, high, weight, p_v - back, at, None, PARTS)
        total += weight
        distance = tl.load(p_offset + x + 1)
    for x in tl.range(inside, count, num_stages=1):
        edge, keep, s = _edge_pair(rows, keys, distance, D)
        weight = tl.where(keep, tl.exp2(s * scale - base), 0.0)
        low, high = _add(low, high, weight, p_v, edge, keep[:, None], PARTS)
        total += weight
        distance = tl.load(p_offset + x + 1)
    return low, high, total


@triton.jit
def _add_online(low, high, total, peak, rows, keys, p_offset, count, scale, D: tl.constexpr):
    """`_add_relative` by an online softmax from peak [R] on; reads no value of a key that a row does not keep."""
    distance = tl.load(p_offset)
    for x in tl.range(0, count, num_stages=1):
        edge, keep, s = _edge_pair(rows, keys, distance, D)
        s = tl.where(keep, s * scale, -float("inf"))
        new_peak = tl.maximum(peak, s)
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight, fade = tl.exp2(s - base), tl.exp2(peak - base)
        low, high = _add(low * fade[:, None], high * fade[:, None], weight, keys[1], edge, keep[:, None], D // _PART)
        total = total * fade + weight
        peak = new_peak
        distance = tl.load(p_offset + x + 1)
    return low, high, total, tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def diagonals_kernel(
    q,
    k,
    v,
    bias,
    part,
    p_part_lse,
    out,
    p_lse,
    places,
    p_ends,
    p_corner_rows,
    p_offsets,
    p_below,
    n,
    room,
    tiles,
    scale,
    q_slots,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """part float32 [B, Hq, Tq, D], p_part_lse [B, Hq, Tq], of the rest of the keys -> out, p_lse; K and V with rows of D numbers in
    succession; rows of a program as in `forward_kernel`. p_offsets [H, room] and p_below [2, H, tiles] as in `Scattered`.

    With AGAIN only tiles that have an LSE of NaN, by an online softmax.
    """
    PARTS: tl.constexpr = D // _PART
    h, i_s = tl.program_id(1), tl.program_id(2)
    span = span_of(places, i_s)
    batch, _, first, k_start, k_len = span
    t = tl.cdiv(k_len, M) - 1 - tl.program_id(0)
    if (t + 1) * M <= first or t < 0:
        return
    i, head, slot, row_ok = rows_of_tile(tl.arange(0, M * GP), h, t, span, G, GP, M)
    # Rows beyond the text read as its last row.
    i = tl.minimum(i, k_len - 1)
    kv_head = h // G if GP == 1 else h
    heads = H if GP == 1 else H * G
    at_lse = (batch * heads + head) * q_slots + slot
    if AGAIN:
        lse = tl.load(p_lse + at_lse, mask=row_ok, other=0.0)
        if has_nan(lse) == 0:
            return
    o_d = tl.arange(0, _PART)
    ok = row_ok[:, None]
    p_q = (q.p + batch * q.s_batch + head.to(tl.int64) * q.s_head + slot * q.s_row)[:, None] + o_d[None, :]
    q_low = _load(p_q, ok)
    q_high = q_low
    p_part = (part.p + batch * part.s_batch + head.to(tl.int64) * part.s_head + slot * part.s_row)[:, None] + o_d[None, :]
    low = tl.load(p_part, mask=ok, other=0.0)
    high = low
    if PARTS == 2:
        q_high = _load(p_q + _PART, ok)
        high = tl.load(p_part + _PART, mask=ok, other=0.0)
    peak = tl.load(p_part_lse + at_lse, mask=row_ok, other=0.0) * LOG2E
    empty = peak == -float("inf")
    base = tl.where(empty, 0.0, peak)
    total = tl.where(empty, 0.0, 1.0)
    p_k = head_base(k, batch, kv_head) + k_start * k.s_row
    p_v = head_base(v, batch, kv_head) + k_start * v.s_row
    p_bias, s_bias = None, 0
    if bias is not None:
        p_bias = head_base(bias, batch, kv_head) + k_start * bias.s_row
        s_bias = bias.s_row
    # A row keeps a key by its distance alone where the rest does not keep it by `end`, so where that is at most the row; rows of a
    # corner follow the corner.
    last = i
    if p_corner_rows is not None:
        last = tl.where(i >= tl.load(p_corner_rows + h), i, _NEVER)
    rows, keys = (q_low, q_high, i, last), (p_k, p_v, p_bias, s_bias, p_ends + h * n)
    p_offset = p_offsets + h * room
    count = tl.load(p_below + (H + h) * tiles + t)
    if AGAIN:
        low, high, total, base = _add_online(low, high, total, peak, rows, keys, p_offset, count, scale * LOG2E, D)
    else:
        inside = tl.load(p_below + h * tiles + t)
        low, high, total = _add_relative(low, high, total, base, rows, keys, p_offset, inside, count, scale * LOG2E, D)
        # Weights of finite values can add up beyond float32 where their products with small values do not.
        beyond = tl.max(total, 0) == float("inf")
        if (tl.max((empty & row_ok).to(tl.int32), 0) == 1) | beyond | (is_finite(low) == 0) | (is_finite(high) == 0):
            total = total * float("nan")

    nothing = total == 0
    by = tl.where(nothing, 1.0, total)[:, None]
    p_out = (out.p + batch * out.s_batch + head.to(tl.int64) * out.s_head + slot * out.s_row)[:, None] + o_d[None, :]
    tl.store(p_out, (low / by).to(out.p.dtype.element_ty), mask=ok)
    if PARTS == 2:
        tl.store(p_out + _PART, (high / by).to(out.p.dtype.element_ty), mask=ok)
    tl.store(p_lse + at_lse, tl.where(nothing, -float("inf"), (base + tl.log2(total)) * LN2), mask=row_ok)


class PrefillInParts:
    """`Prefill` for layouts with scattered diagonals: the rest of the layout, in float32, then those."""

    def __init__(self, call: Call, rest: Prefill, parts: Scattered) -> None:
        self._rest = rest
        geometry = Geometry(call, _TILES)
        below, constants = parts.below(geometry.positions), geometry.constants()
        self._launches = [
            Launch(
                diagonals_kernel,
                (geometry.query_tiles, call.layout.heads, len(call.spans)),
                parts.rest.end[0].contiguous(),
                call.layout.corner_rows,
                parts.offsets,
                below,
                call.layout.length,
                parts.offsets.shape[1],
                below.shape[2],
                call.scale,
                call.q.shape[2],
                **{name: constants[name] for name in ("H", "G", "GP", "M", "D")},
                AGAIN=again,
                num_warps=_TILES.warps,
                **rounding(call),
            )
            for again in (False, True)
        ]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Rows | None, places: Places) -> tuple[Tensor, Tensor]:
        part, part_lse = self._rest(q, k, v, bias, places, out_dtype=torch.float32)
        out, lse = new_outputs(q, v)
        k, v = k.contiguous(), v.contiguous()
        for launch in self._launches:
            launch(rows_of(q), rows_of(k), rows_of(v), bias, rows_of(part), part_lse, rows_of(out), lse, places)
        return out, lse
