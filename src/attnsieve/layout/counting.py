"""Kept pairs of a layout, counted without n x n memory: by key, how many rows see it through each of the vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnsieve.layout.vectors import Layout

# Pairs of a corner that are looked at at once.
_CORNER_PAIRS = 1 << 22


def pairs_of_head(layout: Layout, z: int, h: int, n: int) -> int:
    """Pairs that head h of sequence z keeps among the first n positions, each counted once."""
    first = 0 if layout.corner_rows is None else min(int(layout.corner_rows[h]), n)
    keys = torch.arange(n, device=layout.device)
    end = layout.end[z, h, :n].long()
    by_end = (end.clamp_max(n) - keys.clamp_min(first)).clamp_min(0).sum()
    count = _Counted(end, first, _distances_below(layout, z, h, n))
    by_offset = count.by_offset(keys, torch.full_like(keys, n)).sum()
    return int(_pairs_in_corner(layout, h, first) + by_end + by_offset + _pairs_only_in_blocks(layout, z, h, n, count))


def _pairs_in_corner(layout: Layout, h: int, side: int) -> Tensor:
    """Pairs of the first `side` rows, all of them in the corner."""
    total = torch.zeros((), dtype=torch.int64, device=layout.device)
    if layout.corner is None:
        return total
    keys, bit = torch.arange(side, device=layout.device), torch.arange(8, dtype=torch.uint8, device=layout.device)
    for first, stop in corner_parts(side):
        packed = layout.corner[h, first:stop, : -(-stop // 8), None]
        kept = (packed >> bit).bitwise_and_(1).flatten(1)[:, :stop].bool()
        total += (kept & (keys[:stop] <= keys[first:stop, None])).sum()
    return total


def corner_parts(side: int) -> Iterator[tuple[int, int]]:
    """The first `side` rows of a corner in parts, each its first row and the one after its last: columns that begin late have corners
    whose pairs would not fit in memory unless they are packed."""
    step = max(1, _CORNER_PAIRS // max(1, side))
    return ((first, min(first + step, side)) for first in range(0, side, step))


@dataclass(frozen=True, eq=False)
class _Counted:
    """Counts of rows that see a key by distance alone: end int64 [n], the first row of the rule, kept distances below each."""

    end: Tensor
    first: int
    below: Tensor

    def lowest_row(self, keys: Tensor) -> Tensor:
        """The first row from which `keys` are no longer kept by `end`."""
        return torch.maximum(self.end[keys], keys.clamp_min(self.first))

    def by_offset(self, keys: Tensor, stop: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Rows in [lowest, stop) that keep `keys` by distance; lowest defaults to `lowest_row`."""
        lowest = torch.minimum(self.lowest_row(keys) if lowest is None else lowest, stop)
        return self.below[(stop - keys).clamp_min(0)] - self.below[(lowest - keys).clamp_min(0)]


def _distances_below(layout: Layout, z: int, h: int, n: int) -> Tensor:
    """int64 [n + 1]: how many kept distances are below each distance."""
    kept = layout.end.new_zeros(n) if layout.offset is None else layout.offset[z, h, :n]
    return torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))


def _pairs_only_in_blocks(layout: Layout, z: int, h: int, n: int, count: _Counted) -> Tensor | int:
    """Pairs in listed blocks that neither `end` nor `offset` keeps."""
    if layout.blocks is None:
        return 0
    size, width = layout.blocks.rows, layout.blocks.keys
    listed = layout.blocks.index[z, h].long()
    block_row = torch.arange(len(listed), device=layout.device)[:, None, None]
    keys = listed[..., None] * width + torch.arange(width, device=layout.device)
    real = (listed >= 0)[..., None] & (keys < n)
    keys = torch.where(real, keys, 0)
    start, stop = (block_row * size).clamp_max(n), ((block_row + 1) * size).clamp_max(n)
    lowest = torch.maximum(count.lowest_row(keys), start)
    rows = (stop - lowest).clamp_min(0) - count.by_offset(keys, stop, lowest)
    return torch.where(real, rows, 0).sum()
