"""Decode: few queries, many keys. Programs share the places of one query and a KV group's heads (`shares`, `decode_places`).

How many places a head has is known on the device only, so programs are dealt to heads there: nothing waits for the host, and a step
can be replayed in a graph.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import Places, Rows, head_base, places_of, rows_of, span_of
from attnsieve.backends.triton.decode_places import Row, plain_heads, row_places, sections_of
from attnsieve.backends.triton.decode_rule import rule
from attnsieve.backends.triton.geometry import padded_value
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.outputs import clear_slots, new_outputs
from attnsieve.backends.triton.shares import COMBINED, Source, Tuning, attend_share, combine_shares, shape_of, split_output
from attnsieve.backends.triton.tuning import decode_tuning
from attnsieve.device import multiprocessors, padded

_MOST_HEADS = 32
# Queries and words among which programs are dealt: longer sequences get more of them.
_DEALT_TOGETHER = 128


@triton.jit
def _deal(rule, places, x, programs, first_query, queries, q_slots, H: tl.constexpr, Q: tl.constexpr, QH: tl.constexpr, shape):
    """Deal `programs` programs to pairs of Q queries, from first_query on, and H words; each gets one at least.

    Returns the pair of program x (QH, which is Q * H or more, if it is left over), the pair's first program and the one after
    its last, and places of a program.
    """
    pair = tl.arange(0, QH)
    query = first_query + pair // H
    ok = (pair < Q * H) & (query < queries)
    query = tl.minimum(query, queries - 1)
    _, _, first, _, k_len = span_of(places, query // q_slots)
    p = first + query % q_slots
    ok = ok & (p < k_len)
    stop = sections_of(rule, pair % H, tl.where(ok, p, 0), shape).stop
    chunks = tl.where(ok, stop // shape.N, 0)
    length = tl.maximum(tl.cdiv(tl.sum(chunks, 0), programs - Q * H), 1)
    dealt = tl.where(ok, tl.maximum(tl.cdiv(chunks, length), 1), 0)
    after = tl.cumsum(dealt, 0)
    mine = tl.sum((after <= x).to(tl.int32), 0)
    return mine, tl.sum(tl.where(after <= x, dealt, 0), 0), tl.sum(tl.where(pair <= mine, dealt, 0), 0), length * shape.N


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    bias,
    p_acc,
    p_sum,
    p_range,
    places,
    rule,
    scale,
    queries,
    q_slots,
    shape,
    OWN_MASKS: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    QH: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One share of one query and word: p_acc and p_sum as `shares.attend_share` says, p_range [S * Tq, H, 2] what is whose.

    PARTS words read the same KV head.
    """
    x, programs, first_query = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * Q
    pair, first_x, stop_x, length = _deal(rule, places, x, programs, first_query, queries, q_slots, H, Q, QH, shape)
    if pair >= QH:
        return
    o_query, h = first_query + pair // H, pair % H
    o_share = tl.program_id(1) * programs + x
    if x == first_x:
        p_mine = p_range + (o_query * H + h) * 2
        tl.store(p_mine, o_share)
        tl.store(p_mine + 1, o_share - first_x + stop_x)
    i_s = o_query // q_slots
    batch, q_start, first, k_start, _ = span_of(places, i_s)
    p = first + o_query % q_slots
    o_z = i_s.to(tl.int64) * H if OWN_MASKS else tl.cast(0, tl.int64)
    row = Row(h, (o_z + h) * shape.BITS, p, sections_of(rule, h, p, shape), plain_heads(rule, h, p, shape))
    start = (x - first_x) * length
    stop = tl.minimum(start + length, row.sections.stop)
    p_q = head_base(q, batch, h * shape.G + tl.arange(0, shape.ROWS)) + (q_start + p - first) * q.s_row
    p_k, p_v = head_base(k, batch, h // PARTS), head_base(v, batch, h // PARTS)
    p_bias, s_bias = None, 0
    if bias is not None:
        p_bias = head_base(bias, batch, h // PARTS) + k_start * bias.s_row
        s_bias = bias.s_row
    source = Source(p_k + k_start * k.s_row, k.s_row, p_v + k_start * v.s_row, v.s_row, p_bias, s_bias)
    attend_share(row_places, rule, row, source, p_q, p_acc, p_sum, o_share, start, stop, scale, shape, STAGES)


@triton.jit
def combine_kernel(
    p_acc, p_sum, p_range, out, p_lse, places, n_spans, n_slots, q_slots, shape, C: tl.constexpr, STEP: tl.constexpr
):
    """Combine the shares of one query and head, C numbers of the output; and clear slots that no sequence covers, of B * Tq in all."""
    head, o_query, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    # Before anything that waits for other loads: what is read here is nothing if the query is none.
    p_mine = p_range + (o_query * (heads // shape.G) + head // shape.G) * 2
    start, stop = tl.load(p_mine), tl.load(p_mine + 1)
    if part == 0:
        for o_slot in range(o_query, n_slots, tl.num_programs(1)):
            batch, slot = o_slot // q_slots, o_slot % q_slots
            clear_slots(out, p_lse, places, n_spans, batch, head, heads, slot, 1, q_slots, shape.DV, shape.DVP)
    batch, q_start, first, _, k_len = span_of(places, o_query // q_slots)
    p = first + o_query % q_slots
    if p >= k_len:
        return
    o_dv = part * C + tl.arange(0, C)
    value, lse = combine_shares(p_acc, p_sum, start, stop, head % shape.G, o_dv, shape, STEP)
    slot = q_start + p - first
    p_out = head_base(out, batch, head) + slot * out.s_row + o_dv
    tl.store(p_out, value.to(out.p.dtype.element_ty), mask=o_dv < shape.DV)
    tl.store(p_lse + (batch * heads + head) * q_slots + slot, lse, mask=part == 0)


class Decode:
    """The decode kernels for calls like `call`: those with another q, k, v, bias or spans of the same dtypes and device, and shapes
    but for the number of keys."""

    def __init__(self, call: Call, tuning: Tuning | None = None) -> None:
        (batch, heads, q_slots, width), v_width = call.q.shape, call.v.shape[-1]
        tuning = decode_tuning(padded(width) + padded_value(v_width), call.q.dtype) if tuning is None else tuning
        group, bits = _words(call)
        words, queries = heads // group, len(call.spans) * q_slots
        together = max(1, min(queries, _DEALT_TOGETHER // words))
        deals = -(-queries // together)
        programs = max(_resident(call, tuning) // deals, 2 * together * words)
        shape = shape_of(group, bits, tuning.keys, width, v_width, call.q.dtype)
        found = rule(call.layout, bits)
        self._shares = (deals * programs, group, padded_value(v_width))
        self._ranges = (queries, words, 2)
        sides = (words, together, triton.next_power_of_2(together * words), call.group // group)
        rest = (found, call.scale, queries, q_slots, shape, call.layout.sequences > 1, *sides)
        self._attend = Launch(decode_kernel, (programs, deals, 1), *rest, **tuning.options(found.listed))
        slots = (len(call.spans), batch * q_slots, q_slots)
        size, parts = split_output(v_width)
        self._combine = Launch(combine_kernel, (heads, queries, parts), *slots, shape, size, COMBINED)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Rows | None, places: Places) -> tuple[Tensor, Tensor]:
        acc = q.new_empty(self._shares, dtype=torch.float32)
        sums = q.new_empty(self._shares[:2], dtype=torch.float32)
        ranges = q.new_empty(self._ranges, dtype=torch.int32)
        out, lse = new_outputs(q, v)
        self._attend(rows_of(q), rows_of(k), rows_of(v), bias, acc, sums, ranges, places)
        self._combine(acc, sums, ranges, rows_of(out), lse, places)
        return out, lse


def decode(call: Call, tuning: Tuning | None = None) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype and LSE [B, Hq, Tq] in float32, for few queries."""
    bias = None if call.key_bias is None else Rows(call.key_bias, *call.key_bias.stride())
    return Decode(call, tuning)(call.q, call.k, call.v, bias, places_of(call.spans))


def _words(call: Call) -> tuple[int, int]:
    """Query heads that read keys together, and bits of a word: one for each, or one for all where they share masks."""
    if call.layout.heads == call.k.shape[1]:
        return call.group, 1
    group = _largest_part(call.group)
    return group, group


@cache
def _largest_part(group: int) -> int:
    """The most query heads that have a bit each in a word and fill words evenly."""
    return max(size for size in range(1, _MOST_HEADS + 1) if group % size == 0)


def _resident(call: Call, tuning: Tuning) -> int:
    """Programs that the device holds at once."""
    processors = multiprocessors(call.q.device) if call.q.is_cuda else 2
    return processors * tuning.programs
