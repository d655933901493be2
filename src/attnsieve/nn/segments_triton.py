"""`Segments.of_spans` on a GPU, in one launch."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch
from attnsieve.spans import Spans


class KeySpans(NamedTuple):
    """Vectors of `attnsieve.spans.Spans` and elements from one entry to the next."""

    p_batch: Any
    p_start: Any
    p_length: Any
    s_batch: Any
    s_start: Any
    s_length: Any


def of_spans(spans: Spans, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    """int32 [B, n]: start and stop of the key slots of `spans`."""
    vectors = (spans.batch, spans.k_start, spans.k_len)
    start, stop = torch.empty(2, batch, slots, dtype=torch.int32, device=spans.batch.device).unbind()
    keys = KeySpans(*vectors, *(vector.stride(0) for vector in vectors))
    launch(_segments_kernel, (triton.cdiv(slots, 256), batch), keys, start, stop, len(spans), slots, STEP=256)
    return start, stop


@triton.jit
def _segments_kernel(spans, p_start, p_stop, n_spans, slots, STEP: tl.constexpr):
    """Every slot looks for the span that it lies in."""
    slot, row = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.program_id(1)
    start, stop = slot, slot
    for x0 in range(0, n_spans, 16):
        x = x0 + tl.arange(0, 16)
        ok = x < n_spans
        ok = ok & (tl.load(spans.p_batch + x * spans.s_batch, mask=ok, other=-1) == row)
        first = tl.load(spans.p_start + x * spans.s_start, mask=ok, other=0).to(tl.int32)
        after = first + tl.load(spans.p_length + x * spans.s_length, mask=ok, other=0).to(tl.int32)
        inside = (slot[:, None] >= first[None, :]) & (slot[:, None] < after[None, :])
        start = tl.minimum(start, tl.min(tl.where(inside, first[None, :], slots), 1))
        stop = tl.maximum(stop, tl.max(tl.where(inside, after[None, :], 0), 1))
    at = row.to(tl.int64) * slots + slot
    tl.store(p_start + at, start, mask=slot < slots)
    tl.store(p_stop + at, stop, mask=slot < slots)
