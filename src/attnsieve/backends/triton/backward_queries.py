"""dQ: the grid, lists and loops of the forward pass.

P = exp(S - LSE), dS = P * (dO V^T - delta), dQ = scale dS K, with delta = rowsum(dO * O) - dLSE.

With O rounded to half precision, delta is off by one error for all keys of a row. dQ and dK bear that; in the gradient of a key
bias it adds up over the keys with one sign. The rows of dS tell it, since they should sum to dLSE: the pass corrects delta for
the kernels of dK, dV and d bias.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from attnsieve.backends.triton.bits import tile_keys
from attnsieve.backends.triton.common import (
    LOG2E,
    NO_CUT,
    head_base,
    keys_to_read,
    listed_scores,
    load_rows,
    rows_of_tile,
    single_list,
    span_of,
    tile_keep,
)
from attnsieve.backends.triton.product_columns import at_most_0, biased


@triton.jit
def delta_kernel(out, d_out, p_lse, d_lse, p_delta, heads, q_slots, DV: tl.constexpr, DVP: tl.constexpr, STEP: tl.constexpr):
    """delta [B, Hq, Tq] = rowsum(dO * O) - dLSE; 0 for rows that keep nothing, whatever flows into their LSE."""
    o_bh = tl.program_id(1).to(tl.int64)
    batch, head = o_bh // heads, o_bh % heads
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    ok = slot < q_slots
    o_tile = load_rows(head_base(out, batch, head), slot, out.s_row, ok, DV, DVP, True)
    d_tile = load_rows(head_base(d_out, batch, head), slot, d_out.s_row, ok, DV, DVP, True)
    delta = tl.sum(o_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
    if d_lse is not None:
        delta -= tl.load(head_base(d_lse, batch, head) + slot * d_lse.s_row, mask=ok, other=0.0)
    lse = tl.load(p_lse + o_bh * q_slots + slot, mask=ok, other=0.0)
    tl.store(p_delta + o_bh * q_slots + slot, tl.where(lse == -float("inf"), 0.0, delta), mask=ok)


@triton.jit
def _add_dq(
    dq,
    rest,
    s,
    k_tile,
    d_tile,
    lse2,
    delta,
    v,
    p_v,
    j,
    ok,
    scale2,
    shape: tl.constexpr,
    GUARD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """dq [R, DP] += dS K over keys j with scores s; with BIAS rest [R] += rowsum(dS)."""
    v_tile = load_rows(p_v, j, v.s_row, ok, shape.DV, shape.DVP, GUARD)
    less = s * scale2 - lse2[:, None]
    weights = tl.exp2(at_most_0(less) if BIAS else less)
    dp = tl.dot(d_tile, tl.trans(v_tile), input_precision=shape.PRECISION)
    ds = weights * (dp - delta[:, None])
    if BIAS:
        rest += tl.sum(ds, 1)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=shape.PRECISION), rest


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    bias,
    d_out,
    p_lse,
    p_delta,
    d_lse,
    d_q,
    places,
    mask,
    tiles,
    singles,
    marks,
    scale,
    q_slots,
    shape: tl.constexpr,
):
    """dQ of one query tile, layout head and sequence; rows, lists and loops as in `forward_kernel`. With a bias delta is corrected."""
    M: tl.constexpr = shape.M
    N: tl.constexpr = shape.N
    DP: tl.constexpr = shape.DP
    PRECISION: tl.constexpr = shape.PRECISION
    h, i_s = tl.program_id(1), tl.program_id(2)
    span = span_of(places, i_s)
    batch, _, first, k_start, k_len = span
    t = tl.cdiv(k_len, M) - 1 - tl.program_id(0)
    if (t + 1) * M <= first or t < 0:
        return
    o_zh = (i_s.to(tl.int64) if shape.OWN_MASKS else tl.cast(0, tl.int64)) * shape.H + h
    o_list = o_zh * mask.tiles + t
    r = tl.arange(0, M * shape.GP)
    i, head, slot, row_ok = rows_of_tile(r, h, t, span, shape.G, shape.GP, M)
    kv_head = h // shape.G if shape.GP == 1 else h
    heads = shape.H if shape.GP == 1 else shape.H * shape.G
    o_d, o_dv = tl.arange(0, DP), tl.arange(0, shape.DVP)
    p_q = head_base(q, batch, head) + slot * q.s_row
    p_d = head_base(d_out, batch, head) + slot * d_out.s_row
    q_tile = tl.load(p_q[:, None] + o_d[None, :], mask=row_ok[:, None] & (o_d < shape.D)[None, :], other=0.0)
    d_tile = tl.load(p_d[:, None] + o_dv[None, :], mask=row_ok[:, None] & (o_dv < shape.DV)[None, :], other=0.0)
    o_row = (batch * heads + head) * q_slots + slot
    lse = tl.load(p_lse + o_row, mask=row_ok, other=-float("inf"))
    delta = tl.load(p_delta + o_row, mask=row_ok, other=0.0)
    # exp2(score - inf) = 0: rows that keep nothing and rows of no query take no part.
    lse2 = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    p_k = head_base(k, batch, kv_head) + k_start * k.s_row
    p_v = head_base(v, batch, kv_head) + k_start * v.s_row
    p_bias, s_bias = None, 0
    if bias is not None:
        p_bias = head_base(bias, batch, kv_head) + k_start * bias.s_row
        s_bias = bias.s_row

    dq = tl.zeros([M * shape.GP, DP], tl.float32)
    rest = tl.zeros([M * shape.GP], tl.float32)
    scale2 = scale * LOG2E
    one = scale / scale
    cut = NO_CUT if mask.cut is None else tl.load(mask.cut + o_list)

    if tiles is not None:
        p_tiles = tiles.items + tl.load(tiles.start + o_list)
        n_whole = tl.load(tiles.whole + o_list)
        n_tiles = tl.load(tiles.count + o_list)
        b = tl.load(p_tiles)
        for x in tl.range(0, n_whole, num_stages=shape.STAGES):
            j = b * N + tl.arange(0, N)
            b = tl.load(p_tiles + x + 1)
            k_tile = load_rows(p_k, j, k.s_row, j, shape.D, DP, False)
            s = biased(q_tile, k_tile, p_bias, s_bias, j, j, one, False, PRECISION)
            dq, rest = _add_dq(dq, rest, s, k_tile, d_tile, lse2, delta, v, p_v, j, j, scale2, shape, False, bias is not None)
        for x in tl.range(n_whole, n_tiles, num_stages=shape.STAGES):
            j0 = b * N
            j = tile_keys(mask, j0, N)
            b = tl.load(p_tiles + x + 1)
            ok = j < k_len
            keep = tile_keep(mask, o_zh, h, i[:, None], j[None, :], j0, ok[None, :], cut, N, shape.LISTED, shape.BLOCK, True)
            k_tile = load_rows(p_k, j, k.s_row, ok, shape.D, DP, True)
            s = tl.where(keep, biased(q_tile, k_tile, p_bias, s_bias, j, ok, one, True, PRECISION), -float("inf"))
            dq, rest = _add_dq(dq, rest, s, k_tile, d_tile, lse2, delta, v, p_v, j, ok, scale2, shape, True, bias is not None)

    if singles is not None:
        p_singles, o_n, n_whole, n_singles = single_list(singles, marks, o_list, N)
        listed = tl.load(p_singles + o_n)
        for x in tl.range(0, tl.cdiv(n_singles, N), num_stages=shape.STAGES):
            # Nothing is done with the next keys before the next step: it would wait for them.
            j = keys_to_read(listed, x * N + o_n, n_singles, t * M, k_len)
            listed = tl.load(p_singles + (x + 1) * N + o_n)
            k_tile = load_rows(p_k, j, k.s_row, j, shape.D, DP, False)
            s = biased(q_tile, k_tile, p_bias, s_bias, j, j, one, False, PRECISION)
            if x >= n_whole:
                rows, chunk = (o_zh, o_list, i, r % M), (p_singles, x, n_whole, n_singles)
                s = listed_scores(s, mask, marks, rows, chunk, cut, M, N, shape.LISTED)
            dq, rest = _add_dq(dq, rest, s, k_tile, d_tile, lse2, delta, v, p_v, j, j, scale2, shape, False, bias is not None)

    p_dq = head_base(d_q, batch, head) + slot * d_q.s_row
    tl.store(
        p_dq[:, None] + o_d[None, :], (dq * scale).to(d_q.p.dtype.element_ty), mask=row_ok[:, None] & (o_d < shape.D)[None, :]
    )
    if bias is not None:
        if d_lse is not None:
            p_d_lse = head_base(d_lse, batch, head) + slot * d_lse.s_row
            rest -= tl.load(p_d_lse, mask=row_ok & (lse != -float("inf")), other=0.0)
        tl.store(p_delta + o_row, delta + rest, mask=row_ok)
