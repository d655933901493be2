"""Split-KV attention of the query heads of a KV group: programs attend to shares of its places, other programs combine them.

A place is a row of K and V with a bit for each query head that keeps its key: rows are read once for all heads of the group. Where
places lie is told by a function, PLACES(lists, at, x, shape): slots [N] of the places from x on, which of them exist, and their bits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnsieve.backends.triton.common import LN2, LOG2E, load_rows
from attnsieve.backends.triton.geometry import padded_value
from attnsieve.backends.triton.nonfinite import is_finite
from attnsieve.device import padded

# Shares that are combined at a time: about as many as there are, so that their loads are on their way together.
COMBINED = 128
# Numbers of an output that one program combines, at most: more programs have more loads on their way.
_COMBINED_NUMBERS = 32


@dataclass(frozen=True)
class Tuning:
    """keys: places at a time. ahead: how many times that are on their way while some are used. programs: that share a
    multiprocessor at once; they get as many registers as that leaves."""

    keys: int
    warps: int
    ahead: int
    programs: int

    def options(self, listed: bool) -> dict[str, int]:
        """How to compile. Where a load decides which keys to load, each of the two has its own stages."""
        registers = min(255, 65536 // (32 * self.warps * self.programs) // 8 * 8)
        return {"STAGES": (2 if listed else 1) * self.ahead + 1, "num_warps": self.warps, "maxnreg": registers}


class Shape(NamedTuple):
    """What kernels are specialised on: G query heads in ROWS rows, BITS bits of a place (1 where all heads keep the same keys),
    N places at a time, widths of keys and values, padded too.
    (Triton keeps constants in tuples while they are passed on, not in tuples of tuples and not in variables.)
    """

    G: Any
    BITS: Any
    ROWS: Any
    N: Any
    D: Any
    DP: Any
    DV: Any
    DVP: Any
    PRECISION: Any


class Source(NamedTuple):
    """K, V and the bias per key, or None, of one KV head: the address of slot 0 and elements from slot to slot."""

    p_k: Any
    s_k: Any
    p_v: Any
    s_v: Any
    p_bias: Any
    s_bias: Any


@cache
def shape_of(group: int, bits: int, keys: int, width: int, v_width: int, dtype: torch.dtype) -> Shape:
    """`group` query heads share the places. float32 inputs are multiplied in float32, not in tf32."""
    sides = (group, bits, padded(group), keys, width, padded(width), v_width, padded_value(v_width))
    return Shape._make(map(tl.constexpr, (*sides, "ieee" if dtype == torch.float32 else "tf32")))


@triton.jit
def _look_up(PLACES: tl.constexpr, lists, at, source, q_tile, x, scale, shape):
    """Scores [ROWS, N] in base 2 of the places from x on, -inf where a query head does not keep the key; values [N, DVP]."""
    slot, ok, bits = PLACES(lists, at, x, shape)
    k_tile = load_rows(source.p_k, slot, source.s_k, ok, shape.D, shape.DP, True)
    v_tile = load_rows(source.p_v, slot, source.s_v, ok, shape.DV, shape.DVP, True)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=shape.PRECISION) * (scale * LOG2E)
    if source.p_bias is not None:
        bias = tl.load(source.p_bias + slot.to(tl.int64) * source.s_bias, mask=ok, other=0.0)
        s += (bias.to(tl.float32) * LOG2E)[None, :]
    r = tl.arange(0, shape.ROWS)[:, None]
    of_head = bits[None, :] if shape.BITS == 1 else bits[None, :] >> r
    kept = ((of_head & 1) != 0) & (r < shape.G)
    return tl.where(kept, s, -float("inf")), v_tile


@triton.jit
def _finite_sums(PLACES: tl.constexpr, lists, at, source, q_tile, peak, start, stop, scale, shape):
    """Sums [ROWS, DVP] of the weighted finite values, NaN for query heads that keep a key with others.

    In a product of tiles 0 * NaN is NaN for every head of the group, also for those that do not keep the key.
    """
    base = tl.where(peak == -float("inf"), 0.0, peak)[:, None]
    acc = tl.zeros([shape.ROWS, shape.DVP], tl.float32)
    spoilt = tl.zeros([shape.ROWS], tl.int32)
    for x in tl.range(start, stop, shape.N, num_stages=1):
        s, v_tile = _look_up(PLACES, lists, at, source, q_tile, x, scale, shape)
        finite = v_tile.to(tl.float32) - v_tile.to(tl.float32) == 0
        bad = tl.min(finite.to(tl.int32), 1) == 0
        values = tl.where(finite, v_tile, 0.0).to(v_tile.dtype)
        acc = tl.dot(tl.exp2(s - base).to(v_tile.dtype), values, acc, input_precision=shape.PRECISION)
        spoilt = tl.maximum(spoilt, tl.max(((s != -float("inf")) & bad[None, :]).to(tl.int32), 1))
    return tl.where((spoilt != 0)[:, None], float("nan"), acc)


@triton.jit
def attend_share(
    PLACES: tl.constexpr,
    lists,
    at,
    source,
    p_q,
    p_acc,
    p_sum,
    o_share,
    start,
    stop,
    scale,
    shape,
    STAGES: tl.constexpr,
):
    """Attend to places start .. stop - 1; p_q [ROWS] addresses of queries.

    Stores p_acc [shares, G, DVP]: normalised outputs, and p_sum [shares, G]: LSEs in base 2.
    """
    r, o_d = tl.arange(0, shape.ROWS), tl.arange(0, shape.DP)
    q_tile = tl.load(p_q[:, None] + o_d[None, :], mask=(r < shape.G)[:, None] & (o_d < shape.D)[None, :], other=0.0)
    acc = tl.zeros([shape.ROWS, shape.DVP], tl.float32)
    # Weights are summed over places at the end: across warps a sum is dear.
    weights_so_far = tl.zeros([shape.ROWS, shape.N], tl.float32)
    peak = tl.full([shape.ROWS], -float("inf"), tl.float32)
    for x in tl.range(start, stop, shape.N, num_stages=STAGES):
        s, v_tile = _look_up(PLACES, lists, at, source, q_tile, x, scale, shape)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade, input_precision=shape.PRECISION)
        weights_so_far = weights_so_far * fade + weights
        peak = new_peak
    if is_finite(acc) == 0:
        acc = _finite_sums(PLACES, lists, at, source, q_tile, peak, start, stop, scale, shape)
    total = tl.sum(weights_so_far, 1)
    # A total of NaN is a NaN in K or q, not an empty share.
    empty = total == 0
    o_row = o_share.to(tl.int64) * shape.G + r
    tl.store(p_sum + o_row, tl.where(empty, -float("inf"), peak + tl.log2(total)), mask=r < shape.G)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(p_acc + o_row[:, None] * shape.DVP + tl.arange(0, shape.DVP)[None, :], acc, mask=(r < shape.G)[:, None])


def split_output(v_width: int) -> tuple[int, int]:
    """Numbers of an output that a program combines, and programs that combine all."""
    return min(padded_value(v_width), _COMBINED_NUMBERS), -(-v_width // _COMBINED_NUMBERS)


@triton.jit
def combine_shares(p_acc, p_sum, start, stop, r, o_dv, shape, STEP: tl.constexpr):
    """Numbers o_dv [C] of the output and natural LSE of query head r of a group, from shares start .. stop - 1 weighed by sums."""
    acc = tl.zeros([o_dv.shape[0]], tl.float32)
    total = 0.0
    peak = -float("inf")
    for x in range(start, stop, STEP):
        share = x + tl.arange(0, STEP)
        o_row = share.to(tl.int64) * shape.G + r
        p_part = p_acc + o_row[:, None] * shape.DVP + o_dv[None, :]
        sums = tl.load(p_sum + o_row, mask=share < stop, other=-float("inf"))
        parts = tl.load(p_part, mask=(share < stop)[:, None], other=0.0)
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(sums - base)
        fade = tl.exp2(peak - base)
        acc = acc * fade + tl.sum(parts * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        peak = new_peak
    empty = total == 0
    return acc / tl.where(empty, 1.0, total), tl.where(empty, -float("inf"), (peak + tl.log2(total)) * LN2)
