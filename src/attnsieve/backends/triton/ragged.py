"""Decode over ragged storage on the GPU; `attnsieve.backends.ragged` says where keys lie and which places a query head serves.

Three launches a step, none of which waits for the host: store the new token, attend by shares of places, combine the shares.
A KV head's keys are read once for all query heads of its group.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.ragged import Index, Memory
from attnsieve.backends.triton.common import head_base, rows_of
from attnsieve.backends.triton.geometry import padded_value
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.shares import COMBINED, Source, Tuning, attend_share, combine_shares, shape_of, split_output
from attnsieve.backends.triton.tuning import decode_tuning
from attnsieve.device import padded


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


class Share(NamedTuple):
    """KV head h, whether it is of columns (else of distances), the newest position, and the end of the share's places."""

    h: Any
    is_column: Any
    newest: Any
    stop: Any


@triton.jit
def _places(index, at, x, shape):
    """See `shares`: slots of the places from x on, which of them exist, and bits of the query heads that they serve."""
    heads, is_column = index.heads, at.is_column
    u = x + tl.arange(0, shape.N)
    ok = u < at.stop
    first, own = tl.load(heads.slot + at.h), tl.load(heads.own + at.h)
    reach, window = tl.load(heads.reach + at.h), tl.load(heads.window + at.h)
    far_base = tl.load(heads.first_distance + at.h) - window
    entry_base = tl.where(is_column, tl.load(heads.first_column + at.h), far_base)
    near_base = tl.load(heads.distance_bits + at.h)
    entry = tl.load(index.entries + entry_base + u, mask=ok & (is_column | (u >= window)), other=0)
    distance = tl.where(is_column, at.newest - entry, tl.where(u < window, u, entry))
    position = at.newest - distance
    ok = ok & (position >= 0)
    own_bits = tl.where(is_column, tl.load(heads.column_bits + at.h) + u, near_base + distance)
    served = tl.load(index.bits + own_bits, mask=ok, other=0)
    elsewhere = tl.load(index.bits + near_base + distance, mask=ok & is_column & (distance < reach), other=0)
    slot = tl.where(is_column & (own > 0), first + u, first + own + position % reach)
    return slot, ok, served & ~elsewhere


@triton.jit
def attend_kernel(q, p_acc, p_sum, memory, index, scale, kv_heads, slots, shape, STAGES: tl.constexpr):
    """One share of one group: p_acc, p_sum [B, items, ...] as `shares.attend_share` says."""
    item, b = tl.program_id(0), tl.program_id(1)
    p_item = index.items + item * 4
    h, is_column = tl.load(p_item), tl.load(p_item + 1) != 0
    start, stop = tl.load(p_item + 2), tl.load(p_item + 3)
    p_state = memory.state + (b * kv_heads + h) * 2
    newest, rank = tl.load(p_state) - 1, tl.load(p_state + 1)
    # Distances ascend and are at least their place: no place from newest + 1 on is reached yet.
    stop = tl.minimum(stop, tl.where(is_column, rank, newest + 1))
    p_q = head_base(q, b, h * shape.G + tl.arange(0, shape.ROWS))
    row = b.to(tl.int64) * slots
    source = Source(memory.key + row * shape.D, shape.D, memory.value + row * shape.DV, shape.DV, None, 0)
    at = Share(h, is_column, newest, stop)
    o_share = b * tl.num_programs(0) + item
    attend_share(_places, index, at, source, p_q, p_acc, p_sum, o_share, start, stop, scale, shape, STAGES)


@triton.jit
def combine_kernel(p_acc, p_sum, p_out, p_lse, first_item, items, shape, C: tl.constexpr, STEP: tl.constexpr):
    """Combine the shares of one query head, C numbers of the output."""
    head, b, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_first = first_item + head // shape.G
    start, stop = b * items + tl.load(p_first), b * items + tl.load(p_first + 1)
    o_dv = part * C + tl.arange(0, C)
    out, lse = combine_shares(p_acc, p_sum, start, stop, head % shape.G, o_dv, shape, STEP)
    o_head = b.to(tl.int64) * tl.num_programs(0) + head
    tl.store(p_out + o_head * shape.DV + o_dv, out.to(p_out.dtype.element_ty), mask=o_dv < shape.DV)
    tl.store(p_lse + o_head, lse, mask=part == 0)


class Step:
    """Steps of one text: of tensors like q [B, Hq, 1, D], over this memory."""

    def __init__(self, q: Tensor, memory: Memory, index: Index, scale: float, tuning: Tuning | None = None) -> None:
        batch, heads, _, width = q.shape
        kv_heads, slots, v_width = memory.state.shape[1], memory.key.shape[1], memory.value.shape[-1]
        group, items = heads // kv_heads, len(index.items)
        widths = (width, padded(width), v_width, padded(v_width))
        tuning = decode_tuning(padded(width) + padded_value(v_width), q.dtype) if tuning is None else tuning
        shape = shape_of(group, group, tuning.keys, width, v_width, q.dtype)
        attend = (memory, index, scale, kv_heads, slots, shape)
        self._shares, self._out = (batch, items, group, padded_value(v_width)), (batch, heads, 1, v_width)
        self._append = Launch(append_kernel, (kv_heads, batch, 1), memory, index.heads, index.entries, kv_heads, slots, *widths)
        self._attend = Launch(attend_kernel, (items, batch, 1), *attend, **tuning.options(listed=True))
        size, parts = split_output(v_width)
        self._combine = Launch(combine_kernel, (heads, batch, parts), index.first_item, items, shape, size, COMBINED)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next token of every batch row, k [B, Hkv, 1, D] and v [B, Hkv, 1, Dv], and attend: out [B, Hq, 1, Dv] in q's
        dtype, LSE [B, Hq, 1]."""
        self._append(rows_of(k), rows_of(v))
        acc = q.new_empty(self._shares, dtype=torch.float32)
        sums = q.new_empty(self._shares[:3], dtype=torch.float32)
        out = q.new_empty(self._out)
        lse = q.new_empty(self._out[:3], dtype=torch.float32)
        self._attend(rows_of(q), acc, sums)
        self._combine(acc, sums, out, lse)
        return out, lse
