"""Decode: few queries, many keys. Each program gathers a share of one query's keys and attends to them; shares are combined.

The keys of a query at position p are laid out one section after the other, and programs take every splits-th chunk of N:

    columns   keys that no row drops, up to p - reach, from a list
    window    the `reach` newest keys, those with p < end[j]
    offsets   p - d for the kept distances d
    blocks    the tokens of the blocks listed for p's row of blocks
    corner    the first L keys; alone where p is a corner row

A key that an earlier section serves is left out of later ones. Masked-out keys are not read: the time is that of the kept ones.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import LN2, LOG2E, Rows, head_base, load_rows, places_of, rows_of, span_of
from attnsieve.backends.triton.forward import clear_slots
from attnsieve.backends.triton.geometry import padded
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

# Small chunks: several programs fit on a multiprocessor, each with two chunks in flight.
_KEYS = 32
_WARPS = 4
_STAGES = 3
_PROGRAMS_PER_PROCESSOR = 4


class Sections(NamedTuple):
    """Sources of a query's keys; lengths are 0 for sections that the layout lacks.

    end int32 [Z, H, n]; offset bool [Z, H, n] or None; columns, distances int32 [Z, H, *]; block_index int32 [Z, H, nb, K];
    corner uint8 [H, L, bytes], corner_rows int32 [H].
    """

    end: Any
    offset: Any
    columns: Any
    distances: Any
    block_index: Any
    corner: Any
    corner_rows: Any
    n: Any
    n_columns: Any
    reach: Any
    n_distances: Any
    n_blocks: Any
    block_rows: Any
    block_side: Any
    side: Any
    corner_bytes: Any


@dataclass(frozen=True)
class Plan:
    """Sections and the number of key places that they take together."""

    sections: Sections
    places: int


def plan(layout: Layout) -> Plan:
    """The cached decode plan of a layout.

    Where the masks were chosen from the input nothing is compacted: the window section then spans all keys and the device is
    not read. Else the lists are built, and their sizes read, on first use.
    """
    return layout.schedule("triton decode", lambda: _plan(layout))


def _plan(layout: Layout) -> Plan:
    chosen = layout.most_keys is not None or layout.sequences > 1
    nothing = layout.end.new_zeros(*layout.end.shape[:2], 1)
    columns, distances, reach = nothing, nothing, layout.length
    n_columns = n_distances = 0
    if not chosen:
        forever = layout.end == FOREVER
        position = torch.arange(layout.length, dtype=torch.int32, device=layout.device)
        life = torch.where(forever, 0, layout.end - position).amax()
        kept = torch.zeros_like(forever) if layout.offset is None else layout.offset
        sizes = torch.stack([life, forever.sum(-1).amax(), kept.sum(-1).amax()])
        reach, n_columns, n_distances = (min(int(size), layout.length) for size in sizes.clamp_min(0).tolist())
        columns, distances = _listed(forever, n_columns), _listed(kept, n_distances)
    elif layout.offset is not None:
        distances = torch.arange(layout.length, dtype=torch.int32, device=layout.device).expand_as(layout.end).contiguous()
        n_distances = layout.length
    blocks, corner = layout.blocks, layout.corner
    block_places = 0 if blocks is None else blocks.index.shape[-1] * blocks.keys
    side = 0 if corner is None else corner.shape[1]
    sections = Sections(
        layout.end.contiguous(),
        None if layout.offset is None else layout.offset.contiguous(),
        columns,
        distances,
        None if blocks is None else blocks.index.contiguous(),
        None if corner is None else corner.contiguous(),
        layout.corner_rows,
        n=layout.length,
        n_columns=n_columns,
        reach=reach,
        n_distances=n_distances,
        n_blocks=0 if blocks is None else blocks.index.shape[-1],
        block_rows=0 if blocks is None else blocks.index.shape[-2],
        block_side=1 if blocks is None else blocks.rows,
        side=side,
        corner_bytes=0 if corner is None else corner.shape[2],
    )
    return Plan(sections, n_columns + reach + n_distances + block_places + side)


def _listed(flags: Tensor, most: int) -> Tensor:
    """int32 [Z, H, max(1, most)]: positions of the flags, ascending, then FOREVER."""
    place = torch.where(flags, flags.cumsum(-1) - 1, most)
    position = torch.arange(flags.shape[-1], dtype=torch.int32, device=flags.device)
    listed = torch.full((*flags.shape[:-1], most + 1), FOREVER, dtype=torch.int32, device=flags.device)
    listed.scatter_(-1, place, position.expand_as(place))
    return listed[..., : max(1, most)].contiguous() if most else torch.full_like(listed, FOREVER)


@triton.jit
def _place_keys(sections, o_zh, h, p, k_len, u, BLOCK: tl.constexpr):
    """Keys [N] at places u of the query at position p, and which of them it keeps there."""
    row_end = p * 0
    if sections.corner is not None:
        row_end = tl.load(sections.corner_rows + h)
    plain = p >= row_end
    u_window = u - sections.n_columns
    u_offset = u_window - sections.reach
    u_block = u_offset - sections.n_distances
    in_columns = u_window < 0
    in_window = (u_window >= 0) & (u_offset < 0)
    in_offsets = (u_offset >= 0) & (u_block < 0)

    column = tl.load(sections.columns + o_zh * tl.maximum(sections.n_columns, 1) + u, mask=in_columns, other=0)
    j = tl.where(in_columns, column, p - u_window)
    ok = in_window | (in_columns & (column <= p - sections.reach))
    if sections.offset is not None:
        width = tl.maximum(sections.n_distances, 1)
        distance = tl.load(sections.distances + o_zh * width + u_offset, mask=in_offsets, other=0)
        j = tl.where(in_offsets, p - distance, j)
        ok = ok | in_offsets
    if sections.block_index is not None:
        u_corner = u_block - sections.n_blocks * BLOCK
        in_blocks = (u_block >= 0) & (u_corner < 0)
        p_index = sections.block_index + (o_zh * sections.block_rows + p // sections.block_side) * sections.n_blocks
        index = tl.load(p_index + u_block // BLOCK, mask=in_blocks, other=0)
        j = tl.where(in_blocks, index * BLOCK + u_block % BLOCK, j)
        ok = ok | (in_blocks & (index >= 0))
    else:
        u_corner = u_block
        in_blocks = u < 0
    inside = (j >= 0) & (j <= p) & ok & plain
    by_end = p < tl.load(sections.end + o_zh * sections.n + j, mask=inside & (in_columns == 0), other=0)
    ok = inside & (in_columns | (by_end == in_window))
    if sections.offset is not None:
        by_offset = tl.load(sections.offset + o_zh * sections.n + (p - j), mask=ok & (in_offsets | in_blocks), other=0) != 0
        ok = ok & (in_columns | in_window | (by_offset == in_offsets))
    if sections.corner is not None:
        in_corner = (u_corner >= 0) & (u_corner <= p) & (u_corner < sections.side) & (plain == 0)
        p_byte = sections.corner + (h * sections.side + p).to(tl.int64) * sections.corner_bytes + (u_corner >> 3)
        byte = tl.load(p_byte, mask=in_corner, other=0).to(tl.int32)
        j = tl.where(in_corner, u_corner, j)
        ok = ok | (in_corner & (((byte >> (u_corner & 7)) & 1) != 0))
    return tl.where(ok, j, 0), ok & (j < k_len)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    bias,
    p_acc,
    p_sum,
    places,
    sections,
    scale,
    q_slots,
    n_places,
    H: tl.constexpr,
    OWN_MASKS: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One share of one query: p_acc [S * Tq, Hq, splits, DVP] normalised outputs, p_sum [S * Tq, Hq, splits] LSEs in base 2."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    h, o_query = tl.program_id(1), tl.program_id(2)
    i_s = o_query // q_slots
    batch, q_start, first, k_start, k_len = span_of(places, i_s)
    p = first + o_query % q_slots
    o_zh = (i_s.to(tl.int64) if OWN_MASKS else tl.cast(0, tl.int64)) * H + h
    r = tl.arange(0, ROWS)
    head = h * G + r if PACKED else h + r * 0
    kv_head = h if PACKED else h // G
    row_ok = (r < (G if PACKED else 1)) & (p < k_len)
    o_d = tl.arange(0, DP)
    p_q = q.p + batch * q.s_batch + head.to(tl.int64) * q.s_head + (q_start + p - first) * q.s_row
    q_tile = tl.load(p_q[:, None] + o_d[None, :], mask=row_ok[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = head_base(k, batch, kv_head) + k_start * k.s_row
    p_v = head_base(v, batch, kv_head) + k_start * v.s_row
    acc = tl.zeros([ROWS, DVP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    stop = tl.where(p < k_len, n_places, 0)
    # Keys are looked up one step ahead: the loads of K and V then wait for no other load.
    j, ok = _place_keys(sections, o_zh, h, p, k_len, split * N + tl.arange(0, N), BLOCK)
    for x in tl.range(split * N, stop, splits * N, num_stages=STAGES):
        k_tile = load_rows(p_k, j, k.s_row, ok, D, DP, True)
        v_tile = load_rows(p_v, j, v.s_row, ok, DV, DVP, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        if bias is not None:
            p_bias = head_base(bias, batch, kv_head) + (k_start + j) * bias.s_row
            s += (tl.load(p_bias, mask=ok, other=0.0).to(tl.float32) * LOG2E)[None, :]
        s = tl.where(ok[None, :], s, -float("inf"))
        j, ok = _place_keys(sections, o_zh, h, p, k_len, x + splits * N + tl.arange(0, N), BLOCK)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        peak = new_peak
    # A total of NaN is a NaN in K or q, not an empty share.
    empty = total == 0
    o_row = (o_query * (H * G if PACKED else H) + head).to(tl.int64) * splits + split
    o_dv = tl.arange(0, DVP)
    row = r < (G if PACKED else 1)
    tl.store(p_sum + o_row, tl.where(empty, -float("inf"), peak + tl.log2(total)), mask=row)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(p_acc + o_row[:, None] * DVP + o_dv[None, :], acc, mask=row[:, None])


@triton.jit
def combine_kernel(
    p_acc,
    p_sum,
    out,
    p_lse,
    places,
    n_spans,
    n_slots,
    q_slots,
    heads,
    splits,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh the shares of one query and head by their sums; and clear slots that no sequence covers, of B * Tq in all."""
    head, o_query = tl.program_id(0), tl.program_id(1)
    for o_slot in range(o_query, n_slots, tl.num_programs(1)):
        clear_slots(out, p_lse, places, n_spans, o_slot // q_slots, head, heads, o_slot % q_slots, 1, q_slots, DV, DVP)
    batch, q_start, first, _, k_len = span_of(places, o_query // q_slots)
    p = first + o_query % q_slots
    if p >= k_len:
        return
    o_row = (o_query * heads + head).to(tl.int64) * splits
    o_split, o_dv = tl.arange(0, SPLITS), tl.arange(0, DVP)
    sums = tl.load(p_sum + o_row + o_split, mask=o_split < splits, other=-float("inf"))
    peak = tl.max(sums, 0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    weights = tl.exp2(sums - base)
    total = tl.sum(weights, 0)
    parts = tl.load(p_acc + (o_row + o_split)[:, None] * DVP + o_dv[None, :], mask=(o_split < splits)[:, None], other=0.0)
    value = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    slot = q_start + p - first
    tl.store(head_base(out, batch, head) + slot * out.s_row + o_dv, value.to(out.p.dtype.element_ty), mask=o_dv < DV)
    lse = tl.where(total == 0, -float("inf"), (base + tl.log2(total)) * LN2)
    tl.store(p_lse + (batch * heads + head) * q_slots + slot, lse)


def decode(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype and LSE [B, Hq, Tq] in float32, for few queries."""
    made = plan(call.layout)
    heads, q_slots, width, v_width = call.q.shape[1], call.q.shape[2], call.q.shape[-1], call.v.shape[-1]
    packed = call.layout.heads == call.k.shape[1]
    queries = len(call.spans) * q_slots
    splits = _splits(call, made.places, call.layout.heads * queries)
    acc = call.q.new_empty(queries, heads, splits, padded(v_width), dtype=torch.float32)
    sums = call.q.new_empty(queries, heads, splits, dtype=torch.float32)
    out = call.q.new_empty(*call.q.shape[:3], v_width)
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    places = places_of(call.spans)
    decode_kernel[(splits, call.layout.heads, queries)](
        rows_of(call.q),
        rows_of(call.k),
        rows_of(call.v),
        None if call.key_bias is None else Rows(call.key_bias, *call.key_bias.stride()),
        acc,
        sums,
        places,
        made.sections,
        call.scale,
        q_slots,
        made.places,
        call.layout.heads,
        call.layout.sequences > 1,
        call.group,
        padded(call.group) if packed else 16,
        packed,
        _KEYS,
        width,
        padded(width),
        v_width,
        padded(v_width),
        1 if call.layout.blocks is None else call.layout.blocks.keys,
        "ieee" if call.q.dtype == torch.float32 else "tf32",
        _STAGES,
        num_warps=_WARPS,
    )
    combine_kernel[(heads, queries)](
        acc,
        sums,
        rows_of(out),
        lse,
        places,
        len(call.spans),
        call.q.shape[0] * q_slots,
        q_slots,
        heads,
        splits,
        v_width,
        padded(v_width),
        triton.next_power_of_2(splits),
    )
    return out, lse


def _splits(call: Call, places: int, programs: int) -> int:
    """Shares per query: enough programs to saturate memory, none without a chunk."""
    processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count if call.q.is_cuda else 2
    return max(1, min(-(-places // _KEYS), -(-processors * _PROGRAMS_PER_PROCESSOR // programs), 256))
