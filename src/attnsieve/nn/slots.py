"""Slots: keys kept for later rows, with what attention and selection need to know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnsieve.nn.selection import score_of, strict_key

EMPTY = torch.iinfo(torch.int64).min
_POSITION = 0xFFFFFFFF


@dataclass(eq=False)
class Slots:
    """N slots per (batch row, KV head).

    key [B, H, N, D]; value [B, H, N, Dv]; bias [B, H, N], delta; order int64 [B, H, N], score and position as `strict_key`
    packs them, positions counted within the row's text; EMPTY, below every key, in an empty slot.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    order: Tensor

    @classmethod
    def scored(cls, key: Tensor, value: Tensor, bias: Tensor, sigma: Tensor, position: Tensor) -> Slots:
        """Filled slots; `position` int64 [B, N], negative for padding, whose slots are empty and zero."""
        position = position[:, None]
        padding = position < 0
        slots = cls(key, value, bias, strict_key(sigma, position)).map(
            lambda tensor: tensor.masked_fill(padding[..., None] if tensor.ndim == 4 else padding, 0)
        )
        slots.order.masked_fill_(padding, EMPTY)
        return slots

    def __len__(self) -> int:
        return self.order.shape[-1]

    @property
    def filled(self) -> Tensor:
        """bool [B, H, N]."""
        return self.order != EMPTY

    @property
    def position(self) -> Tensor:
        """int64 [B, H, N]; -1 in an empty slot."""
        return torch.where(self.filled, self.order & _POSITION, -1)

    @property
    def sigma(self) -> Tensor:
        """float32 [B, H, N], the scores; anything in an empty slot."""
        return score_of(self.order)

    def map(self, function: Callable[[Tensor], Tensor]) -> Slots:
        """`function` of every tensor."""
        return Slots(*(function(tensor) for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def empty(self, count: int) -> Slots:
        """`count` empty slots of the same kind."""
        slots = self.map(lambda tensor: tensor.new_zeros(*tensor.shape[:2], count, *tensor.shape[3:]))
        slots.order.fill_(EMPTY)
        return slots

    def part(self, first: int, last: int) -> Slots:
        """Views of the slots [first, last)."""
        return self.map(lambda tensor: tensor[:, :, first:last])

    def join(self, other: Slots) -> Slots:
        """These slots, then `other`."""
        return Slots(*(torch.cat(pair, dim=2) for pair in zip(self.tensors(), other.tensors(), strict=True)))

    def take(self, index: Tensor) -> Slots:
        """Copies of the slots `index` int64 [B, H, M]."""
        return self.map(lambda tensor: tensor.gather(2, _spread(index, tensor)))

    def put(self, index: Tensor, other: Slots) -> None:
        """Overwrite the slots `index` int64 [B, H, M] with `other`."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.scatter_(2, _spread(index, mine), new)


def _spread(index: Tensor, tensor: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, tensor.shape[3]) if tensor.ndim == 4 else index
