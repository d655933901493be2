"""Slots: keys kept for later rows, with what attention and selection need to know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(eq=False)
class Slots:
    """N slots per (batch row, KV head).

    key [B, H, N, D]; value [B, H, N, Dv]; bias [B, H, N], delta; sigma float32 [B, H, N]; position int64 [B, H, N], counted
    within the row's text, -1 in an empty slot.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    sigma: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.position.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Slots:
        """`function` of every tensor."""
        return Slots(*(function(getattr(self, field.name)) for field in fields(self)))

    def empty(self, count: int) -> Slots:
        """`count` empty slots of the same kind."""
        slots = self.map(lambda tensor: tensor.new_zeros(*tensor.shape[:2], count, *tensor.shape[3:]))
        slots.position.fill_(-1)
        return slots

    def part(self, first: int, last: int) -> Slots:
        """Views of the slots [first, last)."""
        return self.map(lambda tensor: tensor[:, :, first:last])

    def join(self, other: Slots) -> Slots:
        """These slots, then `other`."""
        return Slots(*(torch.cat(pair, dim=2) for pair in self._pairs(other)))

    def take(self, index: Tensor) -> Slots:
        """Copies of the slots `index` int64 [B, H, M]."""
        return self.map(lambda tensor: tensor.gather(2, _spread(index, tensor)))

    def put(self, index: Tensor, other: Slots, condition: Tensor) -> None:
        """Overwrite the slots `index` [B, H, M] with `other` where `condition` [B, H, M] holds. Indices are distinct."""
        old = self.take(index)
        for (mine, new), before in zip(self._pairs(other), old._tensors(), strict=True):
            mine.scatter_(2, _spread(index, mine), torch.where(_unsqueeze_as(condition, new), new, before))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def _pairs(self, other: Slots) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._tensors(), other._tensors(), strict=True))


def _unsqueeze_as(index: Tensor, tensor: Tensor) -> Tensor:
    return index[..., None] if tensor.ndim == 4 else index


def _spread(index: Tensor, tensor: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, tensor.shape[3]) if tensor.ndim == 4 else index
