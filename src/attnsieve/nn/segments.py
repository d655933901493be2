"""Segments: which document each slot of a batch belongs to, as vectors that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.device import on_device_of
from attnsieve.errors import require
from attnsieve.spans import Spans


@dataclass(frozen=True, eq=False)
class Segments:
    """int32 [B, n]: the first slot of each slot's document, and the slot after its last.

    A padding slot has start = stop = itself. A document is a run of consecutive slots. Building and using segments never
    reads the device.
    """

    start: Tensor
    stop: Tensor

    @classmethod
    def whole(cls, batch: int, slots: int, device: torch.device | str = "cpu") -> Segments:
        """One document per batch row, no padding."""
        start = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(batch, slots)
        return cls(start, start + slots)

    @classmethod
    def of_spans(cls, spans: Spans, batch: int, slots: int) -> Segments:
        """The key slots of `spans`, which must not overlap. Empty spans are ignored."""
        if spans.batch.is_cuda and not torch.compiler.is_compiling():
            return cls(*_fused(spans, batch, slots))
        spare = torch.where(spans.k_len > 0, spans.k_start, slots)
        after = torch.where(spans.k_len > 0, spans.k_start + spans.k_len, slots)
        depth = torch.zeros(batch, slots + 1, dtype=torch.int32, device=spans.batch.device)
        one = depth.new_ones(len(spans))
        depth.index_put_((spans.batch, spare), one, accumulate=True)
        first = depth > 0
        depth.index_put_((spans.batch, after), -one, accumulate=True)
        first.index_put_((spans.batch, after), one.bool())
        return cls._of(first[:, :slots], depth.cumsum(1)[:, :slots] > 0)

    @classmethod
    def of_inputs(cls, mask: Tensor | None, position_ids: Tensor | None) -> Segments:
        """From a padding mask [B, n] (non-zero: real) and position ids [B, n] that restart where a document begins. Raises
        UserError without either."""
        given = mask if position_ids is None else position_ids
        require(given is not None and given.ndim == 2, "segments come from a mask [B, n], position ids [B, n] or both")
        assert given is not None
        first = torch.zeros_like(given, dtype=torch.bool)
        real = torch.ones_like(first) if mask is None else mask.bool()
        if position_ids is not None:
            first[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        first[:, 1:] |= real[:, 1:] != real[:, :-1]
        return cls._of(first, real)

    @classmethod
    def _of(cls, first: Tensor, real: Tensor) -> Segments:
        """`first`: slots where a run begins (slot 0 always does); `real`: slots that are no padding."""
        slots = first.shape[1]
        index = torch.arange(slots, device=first.device).expand_as(first)
        start = torch.where(first, index, 0).cummax(1).values
        following = torch.where(first, index, slots)[:, 1:].flip(1)
        stop = torch.cat([following.cummin(1).values.flip(1), torch.full_like(index[:, :1], slots)], dim=1)
        start, stop = (torch.where(real, edge, index).to(torch.int32) for edge in (start, stop))
        return cls(start, stop)

    @property
    def real(self) -> Tensor:
        """bool [B, n]: slots that are no padding."""
        return self.stop > self.start

    @property
    def padding(self) -> Tensor:
        """bool [B, n]: the other slots."""
        return self.stop == self.start


def _fused(spans: Spans, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    from attnsieve.nn.segments_triton import of_spans

    with on_device_of(spans.batch):
        return of_spans(spans, batch, slots)  # type: ignore[no-any-return]
