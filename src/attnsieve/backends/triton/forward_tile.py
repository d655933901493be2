"""Prefill of one query tile: online softmax over its key tiles, then its listed keys."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from attnsieve.backends.triton.bits import tile_keys, tile_words
from attnsieve.backends.triton.common import (
    LN2,
    LOG2E,
    NO_CUT,
    head_base,
    keys_to_read,
    listed_scores,
    load_rows,
    masked,
    rows_of_tile,
    scores,
    single_list,
    tile_keep,
)
from attnsieve.backends.triton.nonfinite import is_finite, sums_of_finite


@triton.jit
def _absorb(acc, total, peak, s, scale, v, p_v, j, ok, shape: tl.constexpr, GUARD: tl.constexpr):
    """One step of the online softmax in base 2 over scores s * scale [R, N]: acc [R, DVP], total and peak [R]."""
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    # A row that has kept nothing so far has peak -inf; subtracting 0 instead keeps its weights 0, not NaN.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(s * scale - base[:, None])
    fade = tl.exp2(peak - base)
    v_tile = load_rows(p_v, j, v.s_row, ok, shape.DV, shape.DVP, GUARD)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=shape.PRECISION)
    return acc, total * fade + tl.sum(weights, 1), new_peak


@triton.jit
def forward_tile(q, k, v, bias, out, p_lse, mask, tiles, singles, marks, scale, q_slots, h, i_s, t, span, shape: tl.constexpr):
    """Outputs and LSE of query tile t of layout head h and sequence i_s, which lies at `span`; arguments as `forward_kernel`'s."""
    M: tl.constexpr = shape.M
    N: tl.constexpr = shape.N
    DVP: tl.constexpr = shape.DVP
    PRECISION: tl.constexpr = shape.PRECISION
    batch, _, _, k_start, k_len = span
    o_zh = (i_s.to(tl.int64) if shape.OWN_MASKS else tl.cast(0, tl.int64)) * shape.H + h
    o_list = o_zh * mask.tiles + t
    r = tl.arange(0, M * shape.GP)
    i, head, slot, row_ok = rows_of_tile(r, h, t, span, shape.G, shape.GP, M)
    kv_head = h // shape.G if shape.GP == 1 else h
    heads = shape.H if shape.GP == 1 else shape.H * shape.G

    o_d = tl.arange(0, shape.DP)
    p_q = head_base(q, batch, head) + slot * q.s_row
    q_tile = tl.load(p_q[:, None] + o_d[None, :], mask=row_ok[:, None] & (o_d < shape.D)[None, :], other=0.0)
    p_k = head_base(k, batch, kv_head) + k_start * k.s_row
    p_v = head_base(v, batch, kv_head) + k_start * v.s_row
    p_bias, s_bias = None, 0
    if bias is not None:
        p_bias = head_base(bias, batch, kv_head) + k_start * bias.s_row
        s_bias = bias.s_row

    acc = tl.zeros([M * shape.GP, DVP], tl.float32)
    total = tl.zeros([M * shape.GP], tl.float32)
    peak = tl.full([M * shape.GP], -float("inf"), tl.float32)
    scale2 = scale * LOG2E
    cut = NO_CUT if mask.cut is None else tl.load(mask.cut + o_list)

    # The next tile or keys are looked up one step ahead, so that the loads of K and V depend on no load in flight; lists end
    # with spare entries. Three loops over tiles, not fewer: one that serves two kinds needs more registers than there are.
    if tiles is not None:
        p_tiles = tiles.items + tl.load(tiles.start + o_list)
        n_whole = tl.load(tiles.whole + o_list)
        n_tiles = tl.load(tiles.count + o_list)
        b = tl.load(p_tiles)
        for x in tl.range(0, n_whole, num_stages=shape.STAGES):
            j = b * N + tl.arange(0, N)
            b = tl.load(p_tiles + x + 1)
            k_tile = load_rows(p_k, j, k.s_row, j, shape.D, shape.DP, False)
            s = scores(q_tile, k_tile, p_bias, s_bias, j, j, False, PRECISION)
            acc, total, peak = _absorb(acc, total, peak, s, scale2, v, p_v, j, j, shape, False)
        n_corner = n_whole
        if mask.corner is not None:
            # A program that touches the corner is one of few: it runs a loop of its own, which is not made to be fast.
            n_corner = tl.where(t * M < tl.load(mask.corner_rows + h), n_tiles, n_whole)
            for x in tl.range(n_whole, n_corner, num_stages=1):
                j0 = tl.load(p_tiles + x) * N
                j = tile_keys(mask, j0, N)
                ok = j < k_len
                keep = tile_keep(
                    mask, o_zh, h, i[:, None], j[None, :], j0, ok[None, :], cut, N, shape.LISTED, shape.BLOCK, True
                )
                k_tile = load_rows(p_k, j, k.s_row, ok, shape.D, shape.DP, True)
                s = tl.where(keep, scores(q_tile, k_tile, p_bias, s_bias, j, ok, True, PRECISION), -float("inf"))
                acc, total, peak = _absorb(acc, total, peak, s, scale2, v, p_v, j, ok, shape, True)
        word, far = tile_words(mask, o_zh, i[:, None], b * N, cut, N, shape.BLOCK)
        for x in tl.range(n_corner, n_tiles, num_stages=shape.STAGES):
            j0 = b * N
            j = tile_keys(mask, j0, N)
            b = tl.load(p_tiles + x + 1)
            ok = j < k_len
            k_tile = load_rows(p_k, j, k.s_row, ok, shape.D, shape.DP, True)
            s = scores(q_tile, k_tile, p_bias, s_bias, j, ok, True, PRECISION)
            s = masked(s, word, far, mask, o_zh, i, j, j0, ok, cut, N, shape.LISTED, shape.BLOCK)
            # The entry after the last one may be any tile's: the words of a later one than these rows' are not there to be read.
            word, far = tile_words(mask, o_zh, i[:, None], tl.minimum(b * N, t * M + M), cut, N, shape.BLOCK)
            acc, total, peak = _absorb(acc, total, peak, s, scale2, v, p_v, j, ok, shape, True)

    if singles is not None:
        # One loop for whole and partial chunks: lists are short, and starting a second loop costs as much as several chunks.
        p_singles, o_n, n_whole, n_singles = single_list(singles, marks, o_list, N)
        listed = tl.load(p_singles + o_n)
        for x in tl.range(0, tl.cdiv(n_singles, N), num_stages=shape.STAGES):
            # Nothing is done with the next keys before the next step: it would wait for them.
            j = keys_to_read(listed, x * N + o_n, n_singles, t * M, k_len)
            listed = tl.load(p_singles + (x + 1) * N + o_n)
            k_tile = load_rows(p_k, j, k.s_row, j, shape.D, shape.DP, False)
            s = scores(q_tile, k_tile, p_bias, s_bias, j, j, False, PRECISION)
            if x >= n_whole:
                rows, chunk = (o_zh, o_list, i, r % M), (p_singles, x, n_whole, n_singles)
                s = listed_scores(s, mask, marks, rows, chunk, cut, M, N, shape.LISTED)
            acc, total, peak = _absorb(acc, total, peak, s, scale2, v, p_v, j, j, shape, False)

    if is_finite(acc) == 0:
        acc = sums_of_finite(
            q_tile,
            peak,
            k,
            v,
            p_k,
            p_v,
            p_bias,
            s_bias,
            mask,
            tiles,
            singles,
            o_zh,
            o_list,
            h,
            i,
            k_len,
            cut,
            scale,
            shape,
            min(N, 32),
        )
    # A total of NaN is a NaN in K or q, not an empty row.
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), (peak + tl.log2(total)) * LN2)
    o_dv = tl.arange(0, DVP)
    p_out = head_base(out, batch, head) + slot * out.s_row
    tl.store(p_out[:, None] + o_dv[None, :], acc.to(out.p.dtype.element_ty), mask=row_ok[:, None] & (o_dv < shape.DV)[None, :])
    tl.store(p_lse + (batch * heads + head) * q_slots + slot, lse, mask=row_ok)
