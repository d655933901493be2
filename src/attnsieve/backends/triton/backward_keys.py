"""dK, dV and the gradient of the key bias: programs that own keys and go through the queries that keep them.

dV = P^T dO, dK = scale dS^T Q, d bias = column sums of dS. A program holds a key tile, or a chunk of listed keys for a stretch
of rows, and adds its sums to float32 buffers at its end.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from attnsieve.backends.triton.common import (
    LOG2E,
    NO_CUT,
    head_base,
    list_keep,
    load_rows,
    span_of,
    tile_keep,
)
from attnsieve.backends.triton.product_columns import DELTA_COLUMN, LSE_COLUMN, at_most_0, dot_and_add, indicator


@triton.jit
def _load_rows(q, d_out, columns, batch, head, slot, row_ok, shape: tl.constexpr):
    """Rows `slot` [R] of Q, dO and their columns; zeros where not `row_ok`, which add nothing: dO and delta are 0."""
    p_q = head_base(q, batch, head)
    p_d = head_base(d_out, batch, head)
    p_c = head_base(columns, batch, head)
    q_tile = load_rows(p_q, slot, q.s_row, row_ok, shape.D, shape.DP, True)
    d_tile = load_rows(p_d, slot, d_out.s_row, row_ok, shape.DV, shape.DVP, True)
    return q_tile, d_tile, load_rows(p_c, slot, columns.s_row, row_ok, 16, 16, True)


@triton.jit
def _add_dkv(dk, dv, d_bias, s, q_tile, d_tile, c_tile, v_tile, scale2, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """dk [N, DP] += dS^T Q, dv [N, DVP] += P^T dO, d_bias [N] += column sums of dS; s [N, R] is S^T less the LSE, over scale."""
    weights = tl.exp2(at_most_0(s * scale2) if BIAS else s * scale2)
    dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv, input_precision=PRECISION)
    ones = indicator(DELTA_COLUMN, s.shape[0], c_tile.dtype)
    dp = dot_and_add(v_tile, tl.trans(d_tile), ones, tl.trans(c_tile), PRECISION)
    ds = weights * dp
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    if BIAS:
        d_bias += tl.sum(ds, 1)
    return dk, dv, d_bias


@triton.jit
def _store_dkv(d_k, d_v, p_db, dk, dv, d_bias, batch, head, slot, ok, scale, k_heads, k_slots, shape: tl.constexpr):
    """Add sums to the float32 gradient buffers."""
    o_d, o_dv = tl.arange(0, shape.DP), tl.arange(0, shape.DVP)
    p_dk = head_base(d_k, batch, head) + slot[:, None] * d_k.s_row + o_d[None, :]
    p_dv = head_base(d_v, batch, head) + slot[:, None] * d_v.s_row + o_dv[None, :]
    tl.atomic_add(p_dk, dk * scale, mask=ok[:, None] & (o_d < shape.D)[None, :], sem="relaxed")
    tl.atomic_add(p_dv, dv, mask=ok[:, None] & (o_dv < shape.DV)[None, :], sem="relaxed")
    if p_db is not None:
        tl.atomic_add(p_db + (batch * k_heads + head) * k_slots + slot, d_bias, mask=ok, sem="relaxed")


@triton.jit
def _present(p_items, low, high, first, k_len, M: tl.constexpr):
    """The part of an ascending list of query tiles that has rows in [first, k_len)."""
    before = 0
    within = 0
    for x0 in range(low, high, 128):
        x = x0 + tl.arange(0, 128)
        t = tl.load(p_items + x, mask=x < high, other=2**30 // M)
        before += tl.sum(((t + 1) * M <= first).to(tl.int32), 0)
        within += tl.sum((t * M < k_len).to(tl.int32), 0)
    return low + before, low + within


@triton.jit
def _load_keys(k, v, bias, columns, batch, kv_head, k_start, j, ok, shape: tl.constexpr):
    """Keys j, their values, and their columns beside the rows', which add bias and LSE to the product (`product_columns.py`)."""
    k_tile = load_rows(head_base(k, batch, kv_head) + k_start * k.s_row, j, k.s_row, ok, shape.D, shape.DP, True)
    v_tile = load_rows(head_base(v, batch, kv_head) + k_start * v.s_row, j, v.s_row, ok, shape.DV, shape.DVP, True)
    if bias is None:
        k_columns = indicator(LSE_COLUMN, shape.N, columns.p.dtype.element_ty)
    else:
        k_columns = load_rows(head_base(bias, batch, kv_head) + k_start * bias.s_row, j, bias.s_row, ok, 16, 16, True)
    return k_tile, v_tile, k_columns


@triton.jit
def dkv_tiles_kernel(
    q,
    k,
    v,
    bias,
    d_out,
    columns,
    d_k,
    d_v,
    p_db,
    places,
    mask,
    by_key,
    scale,
    k_slots,
    shape: tl.constexpr,
    OWN_SUMS: tl.constexpr,
):
    """dK, dV and d bias of one key tile from the query tiles that visit it; one program per key tile, layout head, sequence.

    With OWN_SUMS each layout head has buffers of its own, so that every element is added to once: the sum's order is fixed.
    """
    M: tl.constexpr = shape.M
    N: tl.constexpr = shape.N
    DP: tl.constexpr = shape.DP
    DVP: tl.constexpr = shape.DVP
    PRECISION: tl.constexpr = shape.PRECISION
    b, h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, q_start, first, k_start, k_len = span_of(places, i_s)
    if b * N >= k_len:
        return
    o_zh = (i_s.to(tl.int64) if shape.OWN_MASKS else tl.cast(0, tl.int64)) * shape.H + h
    o_list = o_zh * tl.cdiv(mask.n, N) + b
    r = tl.arange(0, M * shape.GP)
    head = h if shape.GP == 1 else h * shape.G + r // M
    kv_head = h // shape.G if shape.GP == 1 else h
    j = b * N + tl.arange(0, N)
    ok = j < k_len
    k_tile, v_tile, k_columns = _load_keys(k, v, bias, columns, batch, kv_head, k_start, j, ok, shape)
    BIAS: tl.constexpr = bias is not None

    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, DVP], tl.float32)
    d_bias = tl.zeros([N], tl.float32)
    scale2 = scale * LOG2E
    p_items = by_key.items + tl.load(by_key.start + o_list)
    whole = tl.load(by_key.whole + o_list)
    low, high = _present(p_items, 0, whole, first, k_len, M)
    t = tl.load(p_items + low)
    for x in tl.range(low, high, num_stages=shape.STAGES):
        i = t * M + r % M
        t = tl.load(p_items + x + 1)
        row_ok = (i >= first) & (i < k_len) & (r // M < shape.G)
        q_tile, d_tile, c_tile = _load_rows(q, d_out, columns, batch, head, q_start + i - first, row_ok, shape)
        s = dot_and_add(k_tile, tl.trans(q_tile), k_columns, tl.trans(c_tile), PRECISION)
        dk, dv, d_bias = _add_dkv(dk, dv, d_bias, s, q_tile, d_tile, c_tile, v_tile, scale2, BIAS, PRECISION)
    low, high = _present(p_items, whole, tl.load(by_key.count + o_list), first, k_len, M)
    t = tl.load(p_items + low)
    for x in tl.range(low, high, num_stages=shape.STAGES):
        i = t * M + r % M
        cut = NO_CUT if mask.cut is None else tl.load(mask.cut + o_zh * mask.tiles + t)
        t = tl.load(p_items + x + 1)
        row_ok = (i >= first) & (i < k_len) & (r // M < shape.G)
        keep = tile_keep(mask, o_zh, h, i[None, :], j[:, None], b * N, ok[:, None], cut, N, shape.LISTED, shape.BLOCK, False)
        q_tile, d_tile, c_tile = _load_rows(q, d_out, columns, batch, head, q_start + i - first, row_ok, shape)
        s = dot_and_add(k_tile, tl.trans(q_tile), k_columns, tl.trans(c_tile), PRECISION)
        s = tl.where(keep, s, -float("inf"))
        dk, dv, d_bias = _add_dkv(dk, dv, d_bias, s, q_tile, d_tile, c_tile, v_tile, scale2, BIAS, PRECISION)
    head = h if OWN_SUMS else kv_head
    k_heads: tl.constexpr = shape.H if OWN_SUMS or shape.GP > 1 else shape.H // shape.G
    _store_dkv(d_k, d_v, p_db, dk, dv, d_bias, batch, head, k_start + j, ok, scale, k_heads, k_slots, shape)


@triton.jit
def dkv_singles_kernel(
    q,
    k,
    v,
    bias,
    d_out,
    columns,
    d_k,
    d_v,
    p_db,
    places,
    mask,
    singles,
    scale,
    k_slots,
    shape: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of N listed keys over a stretch of ROWS positions; programs: (chunk of the list, stretch x layout head, sequence)."""
    M: tl.constexpr = shape.M
    N: tl.constexpr = shape.N
    DP: tl.constexpr = shape.DP
    DVP: tl.constexpr = shape.DVP
    PRECISION: tl.constexpr = shape.PRECISION
    chunk, h, i_s = tl.program_id(0), tl.program_id(1) % shape.H, tl.program_id(2)
    batch, q_start, first, k_start, k_len = span_of(places, i_s)
    stretch = tl.cdiv(k_len, ROWS) - 1 - tl.program_id(1) // shape.H
    if (stretch + 1) * ROWS <= first or stretch < 0:
        return
    o_zh = (i_s.to(tl.int64) if shape.OWN_MASKS else tl.cast(0, tl.int64)) * shape.H + h
    o_list = o_zh * tl.cdiv(mask.n, ROWS) + stretch
    count = tl.load(singles.count + o_list)
    if chunk * N >= count:
        return
    r = tl.arange(0, M * shape.GP)
    head = h if shape.GP == 1 else h * shape.G + r // M
    kv_head = h // shape.G if shape.GP == 1 else h
    o_x = chunk * N + tl.arange(0, N)
    j = tl.load(singles.items + tl.load(singles.start + o_list) + o_x, mask=o_x < count, other=0)
    ok = (o_x < count) & (j < k_len)
    k_tile, v_tile, k_columns = _load_keys(k, v, bias, columns, batch, kv_head, k_start, j, ok, shape)
    BIAS: tl.constexpr = bias is not None

    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, DVP], tl.float32)
    d_bias = tl.zeros([N], tl.float32)
    scale2 = scale * LOG2E
    i0 = tl.maximum(stretch * ROWS, first // M * M)
    i1 = tl.minimum(stretch * ROWS + ROWS, k_len)
    whole = ((chunk + 1) * N <= tl.load(singles.whole + o_list)).to(tl.int32)
    for y in tl.range(i0, i1, M, num_stages=shape.STAGES):
        i = y + r % M
        row_ok = (i >= first) & (i < k_len) & (r // M < shape.G)
        q_tile, d_tile, c_tile = _load_rows(q, d_out, columns, batch, head, q_start + i - first, row_ok, shape)
        s = dot_and_add(k_tile, tl.trans(q_tile), k_columns, tl.trans(c_tile), PRECISION)
        if whole == 0:
            cut = NO_CUT if mask.cut is None else tl.load(mask.cut + o_zh * mask.tiles + y // M)
            keep = list_keep(mask, o_zh, i[None, :], j[:, None], j[:, None], cut, ok[:, None], shape.LISTED)
            s = tl.where(keep, s, -float("inf"))
        dk, dv, d_bias = _add_dkv(dk, dv, d_bias, s, q_tile, d_tile, c_tile, v_tile, scale2, BIAS, PRECISION)
    k_heads = shape.H if shape.GP > 1 else shape.H // shape.G
    _store_dkv(d_k, d_v, p_db, dk, dv, d_bias, batch, kv_head, k_start + j, ok, scale, k_heads, k_slots, shape)
