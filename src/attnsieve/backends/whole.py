"""Spans of calls that come without any: every batch row is one sequence that fills all slots."""

from __future__ import annotations

from torch import Tensor

from attnsieve.device import PerStream
from attnsieve.spans import Spans

_spans = PerStream(lambda device, batch, queries, keys: Spans.full(batch, queries, keys, device))


def whole_spans(q: Tensor, k: Tensor) -> Spans:
    """`Spans.full` of q [B, Hq, Tq, D] and k [B, Hkv, Tk, D]."""
    return _spans(q, q.shape[0], q.shape[2], k.shape[2])
