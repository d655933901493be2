"""Outputs of all kernels: room for them, and the slots that no sequence covers."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import places_of, rows_of
from attnsieve.device import padded
from attnsieve.launching import launch


def new_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out, in q's dtype, and LSE. The heads of a token lie together in memory, as whoever projects
    them wants them."""
    batch, heads, queries, _ = q.shape
    width = v.shape[-1]
    row = heads * width
    out = q.new_empty_strided((batch, heads, queries, width), (queries * row, width, row, 1))
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def clear_uncovered(call: Call, out: Tensor, lse: Tensor | None) -> None:
    """Output 0 and LSE -inf where no sequence has a query; touches no other slot."""
    if call.whole:
        return
    batch, heads, slots, width = out.shape
    grid = (triton.cdiv(slots, 128), batch * heads)
    numbers = (len(call.spans), heads, slots, 128, width, padded(width))
    launch(uncovered_kernel, grid, rows_of(out), lse, places_of(call.spans), *numbers)


@triton.jit
def clear_slots(
    out,
    p_lse,
    places,
    n_spans,
    batch,
    head,
    heads,
    slot0,
    STEP: tl.constexpr,
    q_slots,
    DV: tl.constexpr,
    DVP: tl.constexpr,
):
    """Output 0 and LSE -inf for those of STEP query slots from slot0 on that are in no sequence."""
    slot = slot0 + tl.arange(0, STEP)
    covered = slot >= q_slots
    for x0 in range(0, n_spans, 16):
        x = x0 + tl.arange(0, 16)
        ok = x < n_spans
        row = tl.load(places.p_batch + x * places.s_batch, mask=ok, other=-1)
        start = tl.load(places.p_q_start + x * places.s_q_start, mask=ok, other=0)
        stop = start + tl.load(places.p_q_len + x * places.s_q_len, mask=ok, other=0)
        inside = (slot[:, None] >= start[None, :]) & (slot[:, None] < stop[None, :]) & (row == batch)[None, :]
        covered = covered | (tl.max(inside.to(tl.int32), 1) > 0)
    if tl.min(covered.to(tl.int32), 0) == 0:
        o_d = tl.arange(0, DVP)
        p_out = out.p + batch.to(tl.int64) * out.s_batch + head.to(tl.int64) * out.s_head + slot.to(tl.int64) * out.s_row
        empty = covered == 0
        nothing = tl.zeros([STEP, DVP], out.p.dtype.element_ty)
        tl.store(p_out[:, None] + o_d[None, :], nothing, mask=empty[:, None] & (o_d < DV)[None, :])
        if p_lse is not None:
            tl.store(p_lse + (batch.to(tl.int64) * heads + head) * q_slots + slot, -float("inf"), mask=empty)


@triton.jit
def uncovered_kernel(out, p_lse, places, n_spans, heads, q_slots, STEP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """`clear_slots` for all slots of a batch row and head."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    clear_slots(out, p_lse, places, n_spans, batch, head, heads, tl.program_id(0) * STEP, STEP, q_slots, DV, DVP)
