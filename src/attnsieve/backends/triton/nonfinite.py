"""Prefill where V holds NaN or infinities: they reach the rows that keep their key, and no others.

In a product of tiles 0 * NaN is NaN for every row of the tile, also for rows that come before the key. The prefill kernel finds
such tiles by their sums, at no cost in its loops, and computes them again here, without the online softmax: peaks are known.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from attnsieve.backends.triton.common import LOG2E, list_keep, load_rows, scores, tile_keep


@triton.jit
def is_finite(sums):
    """Whether a program's sums [R, DVP] are all finite; as an integer."""
    rows = tl.sum(sums, 1)
    return tl.min((rows - rows == 0).to(tl.int32), 0)


@triton.jit
def _absorb_finite(acc, spoilt, s, base, scale, keep, v, p_v, j, ok, shape: tl.constexpr):
    """acc [R, DVP] += weights of the finite values at keys j, and spoilt [R]: whether a row keeps a key with others."""
    v_tile = load_rows(p_v, j, v.s_row, ok, shape.DV, shape.DVP, True)
    finite = v_tile.to(tl.float32) - v_tile.to(tl.float32) == 0
    bad = tl.min(finite.to(tl.int32), 1) == 0
    weights = tl.where(keep, tl.exp2(s * scale - base[:, None]), 0.0).to(v_tile.dtype)
    acc = tl.dot(weights, tl.where(finite, v_tile, 0.0).to(v_tile.dtype), acc, input_precision=shape.PRECISION)
    return acc, tl.maximum(spoilt, tl.max((keep & bad[None, :]).to(tl.int32), 1))


@triton.jit
def sums_of_finite(
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
    shape: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums [R, DVP] of the weighted finite values, NaN in rows that keep a key with others. STEP keys at a time: less code."""
    N: tl.constexpr = shape.N
    DVP: tl.constexpr = shape.DVP
    PRECISION: tl.constexpr = shape.PRECISION
    base = tl.where(peak == -float("inf"), 0.0, peak)
    acc = tl.zeros([q_tile.shape[0], DVP], tl.float32)
    spoilt = tl.zeros([q_tile.shape[0]], tl.int32)
    if tiles is not None:
        p_tiles = tiles.items + tl.load(tiles.start + o_list)
        for x in tl.range(0, tl.load(tiles.count + o_list) * (N // STEP), num_stages=1):
            j0 = tl.load(p_tiles + x // (N // STEP)) * N + x % (N // STEP) * STEP
            j = j0 + tl.arange(0, STEP)
            ok = j < k_len
            keep = tile_keep(
                mask, o_zh, h, i[:, None], j[None, :], j0, ok[None, :], cut, STEP, shape.LISTED, shape.BLOCK, False
            )
            k_tile = load_rows(p_k, j, k.s_row, ok, shape.D, shape.DP, True)
            s = scores(q_tile, k_tile, p_bias, s_bias, j, ok, True, PRECISION)
            acc, spoilt = _absorb_finite(acc, spoilt, s, base, scale * LOG2E, keep & ok[None, :], v, p_v, j, ok, shape)
    if singles is not None:
        p_singles = singles.items + tl.load(singles.start + o_list)
        n_singles = tl.load(singles.count + o_list)
        for x in tl.range(0, n_singles, STEP, num_stages=1):
            o_x = x + tl.arange(0, STEP)
            j = tl.load(p_singles + o_x, mask=o_x < n_singles, other=0)
            ok = (o_x < n_singles) & (j < k_len)
            keep = list_keep(mask, o_zh, i[:, None], j[None, :], j[None, :], cut, ok[None, :], shape.LISTED)
            k_tile = load_rows(p_k, j, k.s_row, ok, shape.D, shape.DP, True)
            s = scores(q_tile, k_tile, p_bias, s_bias, j, ok, True, PRECISION)
            acc, spoilt = _absorb_finite(acc, spoilt, s, base, scale * LOG2E, keep & ok[None, :], v, p_v, j, ok, shape)
    return tl.where((spoilt != 0)[:, None], float("nan"), acc)
