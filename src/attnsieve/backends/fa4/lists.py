"""Tile lists as FA4 reads them: for each head and query tile the key tiles that are kept in part, and those kept whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnsieve.layout import Blocks, Layout


class TileLists(NamedTuple):
    """int32 [1, H, T] counts and int32 [1, H, T, K] key tiles, ascending, of 128 x 128 tiles; entries beyond a count mean
    nothing. Tiles after the diagonal are in neither list."""

    part_count: Tensor
    part: Tensor
    whole_count: Tensor
    whole: Tensor

    def rows(self, first: int, stop: int, keys: int) -> TileLists:
        """Query tiles first to stop - 1, which read the first `keys` key tiles."""
        cut = (tensor[:, :, first:stop] for tensor in self)
        return TileLists(*(tensor[..., :keys].contiguous() if tensor.ndim == 4 else tensor.contiguous() for tensor in cut))

    def per_query_head(self, heads: int) -> TileLists:
        """The same lists for every query head of a group."""
        group = heads // self.part.shape[1]
        return self if group == 1 else TileLists(*(tensor.repeat_interleave(group, dim=1) for tensor in self))


def lists_of_blocks(blocks: Blocks, tile: int) -> TileLists:
    """Square blocks, a multiple of `tile` wide, cut into tiles; the tile on the diagonal is kept in part."""
    finer = blocks.rows // tile
    index = blocks.index.repeat_interleave(finer, dim=2)
    cut = index[..., None] * finer + torch.arange(finer, dtype=torch.int32, device=index.device)
    index = torch.where(index[..., None] < 0, -1, cut).flatten(-2)
    row = torch.arange(index.shape[2], dtype=torch.int32, device=index.device)[:, None]
    part_count = (index == row).any(-1).to(torch.int32)
    whole_count = ((index >= 0) & (index < row)).sum(-1, dtype=torch.int32)
    part = row.expand(*part_count.shape, 1).contiguous()
    return TileLists(part_count, part, whole_count, index.clamp_min(0).contiguous())


def lists_of_rule(layout: Layout, tile: int) -> TileLists:
    """The tiles of a layout made of `end` and offset bits, found by the Triton backend's schedule. Reads the device once."""
    from attnsieve.backends.triton.schedule import schedule

    tiles = schedule(layout, tile, tile, listing=False).tiles
    assert tiles is not None
    shape = tiles.count.shape
    start, whole = tiles.start.view(shape), tiles.whole
    part_count = tiles.count - whole
    widest = torch.stack([part_count.max(), whole.max()]).tolist()
    part, kept = (
        _padded(tiles.items, first, max(1, int(width))) for first, width in zip((start + whole, start), widest, strict=True)
    )
    return TileLists(part_count, part, whole, kept)


def _padded(items: Tensor, start: Tensor, width: int) -> Tensor:
    """int32 [..., width]: `width` items from each start on."""
    place = start[..., None] + torch.arange(width, device=items.device)
    return items[place.clamp_max(len(items) - 1)].contiguous()
