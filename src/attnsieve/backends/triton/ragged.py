"""Decode over ragged storage on the GPU; `attnsieve.backends.ragged` says where keys lie and which places a query head serves.

Three launches a step, none of which waits for the host: store the new token, attend by shares of places, combine the shares.
A KV head's keys are read once for all query heads of its group.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.ragged import Index, Memory
from attnsieve.backends.triton.common import LN2, LOG2E, head_base, load_rows, rows_of
from attnsieve.backends.triton.geometry import padded
from attnsieve.backends.triton.nonfinite import is_finite

# Small chunks: several programs fit on a multiprocessor, each with two chunks in flight (three stages are spent on looking
# places up, their slots and bits, and then keys). Looking places up one step ahead by hand keeps the compiler from overlapping.
_KEYS = 32
_WARPS = 4
_STAGES = 5
_SHARES = 32


@triton.jit
def append_kernel(
    k,
    v,
    memory,
    heads,
    entries,
    kv_heads,
    slots,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
):
    """Store the next token of a batch row and KV head, in the ring and, where it is a column, in that column's slot."""
    h, b = tl.program_id(0), tl.program_id(1)
    p_state = memory.state + (b * kv_heads + h) * 2
    position, rank = tl.load(p_state), tl.load(p_state + 1)
    first, own = tl.load(heads.slot + h), tl.load(heads.own + h)
    more = rank < tl.load(heads.columns + h)
    at_column = more & (tl.load(entries + tl.load(heads.first_column + h) + rank, mask=more, other=0) == position)
    ring = first + own + position % tl.load(heads.reach + h)
    column = tl.where(at_column & (own > 0), first + rank, ring)
    o_d, o_dv = tl.arange(0, DP), tl.arange(0, DVP)
    key = tl.load(head_base(k, b, h) + o_d, mask=o_d < D)
    value = tl.load(head_base(v, b, h) + o_dv, mask=o_dv < DV)
    row = b.to(tl.int64) * slots
    tl.store(memory.key + (row + ring) * D + o_d, key, mask=o_d < D)
    tl.store(memory.value + (row + ring) * DV + o_dv, value, mask=o_dv < DV)
    tl.store(memory.key + (row + column) * D + o_d, key, mask=o_d < D)
    tl.store(memory.value + (row + column) * DV + o_dv, value, mask=o_dv < DV)
    tl.store(p_state, position + 1)
    tl.store(p_state + 1, rank + at_column.to(tl.int32))


@triton.jit
def _places(heads, entries, bits, h, is_column, newest, u, stop):
    """Slots [N] of the places u below `stop`, which of them exist, and bits of the query heads that they serve."""
    ok = u < stop
    first, own = tl.load(heads.slot + h), tl.load(heads.own + h)
    reach, window = tl.load(heads.reach + h), tl.load(heads.window + h)
    entry_base = tl.where(is_column, tl.load(heads.first_column + h), tl.load(heads.first_distance + h) - window)
    near_base = tl.load(heads.distance_bits + h)
    entry = tl.load(entries + entry_base + u, mask=ok & (is_column | (u >= window)), other=0)
    distance = tl.where(is_column, newest - entry, tl.where(u < window, u, entry))
    position = newest - distance
    ok = ok & (position >= 0)
    own_bits = tl.where(is_column, tl.load(heads.column_bits + h) + u, near_base + distance)
    served = tl.load(bits + own_bits, mask=ok, other=0)
    elsewhere = tl.load(bits + near_base + distance, mask=ok & is_column & (distance < reach), other=0)
    slot = tl.where(is_column & (own > 0), first + u, first + own + position % reach)
    return slot, ok, served & ~elsewhere


@triton.jit
def _scores(
    q_tile, p_keys, slot, ok, served, scale, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr
):
    """[ROWS, N] in base 2, minus infinity where a query head does not keep the key."""
    k_tile = load_rows(p_keys, slot, D, ok, D, DP, True)
    r = tl.arange(0, q_tile.shape[0])[:, None]
    kept = (((served[None, :] >> r) & 1) != 0) & (r < G)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
    return tl.where(kept, s, -float("inf"))


@triton.jit
def _sums_of_finite(
    q_tile,
    peak,
    p_keys,
    p_values,
    heads,
    entries,
    bits,
    h,
    is_column,
    newest,
    start,
    stop,
    scale,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums [ROWS, DVP] of the weighted finite values, NaN for query heads that keep a key with others.

    In a product of tiles 0 * NaN is NaN for every head of the group, also for those that do not keep the key.
    """
    base = tl.where(peak == -float("inf"), 0.0, peak)
    acc = tl.zeros([q_tile.shape[0], DVP], tl.float32)
    spoilt = tl.zeros([q_tile.shape[0]], tl.int32)
    for x in tl.range(start, stop, N, num_stages=1):
        slot, ok, served = _places(heads, entries, bits, h, is_column, newest, x + tl.arange(0, N), stop)
        v_tile = load_rows(p_values, slot, DV, ok, DV, DVP, True)
        finite = v_tile.to(tl.float32) - v_tile.to(tl.float32) == 0
        bad = tl.min(finite.to(tl.int32), 1) == 0
        s = _scores(q_tile, p_keys, slot, ok, served, scale, G, D, DP, PRECISION)
        weights = tl.exp2(s - base[:, None]).to(v_tile.dtype)
        acc = tl.dot(weights, tl.where(finite, v_tile, 0.0).to(v_tile.dtype), acc, input_precision=PRECISION)
        kept = s != -float("inf")
        spoilt = tl.maximum(spoilt, tl.max((kept & bad[None, :]).to(tl.int32), 1))
    return tl.where((spoilt != 0)[:, None], float("nan"), acc)


@triton.jit
def attend_kernel(
    q,
    memory,
    p_acc,
    p_sum,
    heads,
    entries,
    bits,
    items,
    scale,
    kv_heads,
    slots,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One share of one group: p_acc [B, items, G, DVP] normalised outputs, p_sum [B, items, G] LSEs in base 2."""
    item, b = tl.program_id(0), tl.program_id(1)
    h, is_column = tl.load(items + item * 4), tl.load(items + item * 4 + 1) != 0
    start, stop = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
    p_state = memory.state + (b * kv_heads + h) * 2
    newest, rank = tl.load(p_state) - 1, tl.load(p_state + 1)
    # Distances ascend and are at least their place: no place from newest + 1 on is reached yet.
    stop = tl.minimum(stop, tl.where(is_column, rank, newest + 1))
    r = tl.arange(0, ROWS)
    o_d, o_dv = tl.arange(0, DP), tl.arange(0, DVP)
    p_q = head_base(q, b, h * G + r)
    q_tile = tl.load(p_q[:, None] + o_d[None, :], mask=(r < G)[:, None] & (o_d < D)[None, :], other=0.0)
    p_keys = memory.key + b.to(tl.int64) * slots * D
    p_values = memory.value + b.to(tl.int64) * slots * DV
    acc = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    for x in tl.range(start, stop, N, num_stages=STAGES):
        slot, ok, served = _places(heads, entries, bits, h, is_column, newest, x + tl.arange(0, N), stop)
        v_tile = load_rows(p_values, slot, DV, ok, DV, DVP, True)
        s = _scores(q_tile, p_keys, slot, ok, served, scale, G, D, DP, PRECISION)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        peak = new_peak
    if is_finite(acc) == 0:
        acc = _sums_of_finite(
            q_tile,
            peak,
            p_keys,
            p_values,
            heads,
            entries,
            bits,
            h,
            is_column,
            newest,
            start,
            stop,
            scale,
            G,
            N,
            D,
            DP,
            DV,
            DVP,
            PRECISION,
        )
    kept_any = total != 0
    o_row = (b.to(tl.int64) * tl.num_programs(0) + item) * G + r
    tl.store(p_sum + o_row, tl.where(kept_any, peak + tl.log2(total), -float("inf")), mask=r < G)
    acc = acc / tl.where(kept_any, total, 1.0)[:, None]
    tl.store(p_acc + o_row[:, None] * DVP + o_dv[None, :], acc, mask=(r < G)[:, None])


@triton.jit
def combine_kernel(
    p_acc,
    p_sum,
    p_out,
    p_lse,
    first_item,
    items,
    G: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Weigh the shares of one query head by their sums."""
    head, b = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(first_item + head // G), tl.load(first_item + head // G + 1)
    o_dv = tl.arange(0, DVP)
    acc = tl.zeros([DVP], tl.float32)
    total = 0.0
    peak = -float("inf")
    for x in range(start, stop, SHARES):
        share = x + tl.arange(0, SHARES)
        o_row = (b.to(tl.int64) * items + share) * G + head % G
        sums = tl.load(p_sum + o_row, mask=share < stop, other=-float("inf"))
        parts = tl.load(p_acc + o_row[:, None] * DVP + o_dv[None, :], mask=(share < stop)[:, None], other=0.0)
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(sums - base)
        fade = tl.exp2(peak - base)
        acc = acc * fade + tl.sum(parts * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        peak = new_peak
    kept = total != 0
    o_head = b.to(tl.int64) * tl.num_programs(0) + head
    out = acc / tl.where(kept, total, 1.0)
    tl.store(p_out + o_head * DV + o_dv, out.to(p_out.dtype.element_ty), mask=o_dv < DV)
    tl.store(p_lse + o_head, tl.where(kept, (peak + tl.log2(total)) * LN2, -float("inf")))


def append(memory: Memory, index: Index, k: Tensor, v: Tensor) -> None:
    """Store the next token of every batch row; k [B, Hkv, 1, D], v [B, Hkv, 1, Dv]."""
    batch, kv_heads, _, width = k.shape
    append_kernel[(kv_heads, batch)](
        rows_of(k),
        rows_of(v),
        memory,
        index.heads,
        index.entries,
        kv_heads,
        memory.key.shape[1],
        width,
        padded(width),
        v.shape[-1],
        padded(v.shape[-1]),
    )


def attend(q: Tensor, memory: Memory, index: Index, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest position, already stored. q [B, Hq, 1, D]; out [B, Hq, 1, Dv] in q's dtype, LSE [B, Hq, 1]."""
    batch, heads, _, width = q.shape
    kv_heads, slots, v_width = memory.state.shape[1], memory.key.shape[1], memory.value.shape[-1]
    group, items = heads // kv_heads, len(index.items)
    acc = q.new_empty(batch, items, group, padded(v_width), dtype=torch.float32)
    sums = q.new_empty(batch, items, group, dtype=torch.float32)
    out = q.new_empty(batch, heads, 1, v_width)
    lse = q.new_empty(batch, heads, 1, dtype=torch.float32)
    attend_kernel[(items, batch)](
        rows_of(q),
        memory,
        acc,
        sums,
        index.heads,
        index.entries,
        index.bits,
        index.items,
        scale,
        kv_heads,
        slots,
        group,
        padded(group),
        _KEYS,
        width,
        padded(width),
        v_width,
        padded(v_width),
        "ieee" if q.dtype == torch.float32 else "tf32",
        _STAGES,
        num_warps=_WARPS,
    )
    combine_kernel[(heads, batch)](
        acc,
        sums,
        out,
        lse,
        index.first_item,
        items,
        group,
        v_width,
        padded(v_width),
        _SHARES,
    )
    return out, lse
