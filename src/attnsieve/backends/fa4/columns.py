"""Isolated columns moved in front of K, so that rows which keep a thousand of them read eight tiles and not all.

A kept column is served twice, for different rows: by its own slot while its tile is visited for its neighbours' sake, and by a slot
in front from then on. Slots in front are sorted by the row from which they serve, so those that a query tile keeps are the first
ones. Every slot, in front or not, thereby serves an interval of rows: start <= i < end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.backends.fa4.lists import TileLists, lists_of_rule
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

# A tile with this share of columns is read as a tile.
_DENSE_SHARE = 0.75
# Moving columns copies K and V: it must spare this many tiles for each that it adds.
_LEAST_GAIN = 4


@dataclass(frozen=True)
class Columns:
    """columns int64 [H, C]: positions moved in front, C a multiple of the tile, padding included. start, end int32 [H, C + n]:
    the rows that each slot serves. lists: tiles of those slots, the ones in front first."""

    columns: Tensor
    start: Tensor
    end: Tensor
    lists: TileLists


def move_columns(layout: Layout, tile: int) -> Columns | None:
    """The columns of a layout made of `end` alone, or None where moving them gains nothing. Reads the device."""
    end = layout.end[0]
    flagged = _isolated(end == FOREVER, tile)
    tiles = _per_tile(flagged, tile).any(-1).sum(-1).max()
    most, spread = torch.stack([flagged.sum(-1).max(), tiles]).tolist()
    width = -(-int(most) // tile) * tile
    if spread < _LEAST_GAIN * max(width // tile, 1):
        return None
    start = torch.where(flagged, _leaves(end, flagged, tile), FOREVER)
    own = Layout(layout.length, torch.where(flagged, start, end)[None])
    order = start.argsort(dim=-1, stable=True)[:, :width]
    front = start.gather(-1, order)
    position = torch.arange(layout.length, dtype=torch.int32, device=end.device).expand_as(end)
    return Columns(
        order,
        torch.cat([front, position], dim=-1),
        torch.cat([torch.full_like(front, FOREVER), own.end[0]], dim=-1),
        _behind(lists_of_rule(own, tile), front, tile),
    )


def _isolated(forever: Tensor, tile: int) -> Tensor:
    dense = _per_tile(forever, tile).sum(-1) >= _DENSE_SHARE * tile
    return forever & ~dense.repeat_interleave(tile, dim=-1)[..., : forever.shape[-1]]


def _leaves(end: Tensor, flagged: Tensor, tile: int) -> Tensor:
    """The first row, at the start of a query tile, for which the tile of a key is no longer visited for other keys."""
    others = _per_tile(torch.where(flagged, 0, end), tile).amax(-1)
    after = torch.arange(1, others.shape[-1] + 1, device=end.device, dtype=torch.int32) * tile
    # Ends go up to FOREVER, which rounding up would overflow.
    rows = torch.maximum((others.clamp_max(FOREVER - tile) + tile - 1) // tile * tile, after)
    return rows.to(torch.int32).repeat_interleave(tile, dim=-1)[..., : end.shape[-1]]


def _behind(lists: TileLists, front: Tensor, tile: int) -> TileLists:
    """Lists of tiles behind the slots in front, whose first ones each query tile keeps."""
    shift = front.shape[-1] // tile
    first_row = torch.arange(lists.part.shape[2], dtype=torch.int32, device=front.device) * tile
    kept = torch.searchsorted(front, first_row.expand(len(front), -1).contiguous(), right=True, out_int32=True)[None]
    part_count, part = _before((kept % tile > 0).to(torch.int32), kept // tile, lists.part_count, lists.part + shift)
    whole_count, whole = _before(kept // tile, torch.zeros_like(kept), lists.whole_count, lists.whole + shift)
    return TileLists(part_count, part, whole_count, whole)


def _before(count: Tensor, first: Tensor, old_count: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Lists that begin with `count` tiles from `first` on and go on with the old ones."""
    room = old.shape[-1] + int(count.max())
    place = torch.arange(room, dtype=torch.int32, device=old.device).expand(*count.shape, room)
    behind = (place - count[..., None]).clamp(0, old.shape[-1] - 1).long()
    joined = torch.where(place < count[..., None], first[..., None] + place, old.gather(-1, behind))
    return count + old_count, joined.to(torch.int32).contiguous()


def _per_tile(vector: Tensor, tile: int) -> Tensor:
    """[H, T, tile], zero beyond the last key."""
    tiles: Tensor = torch.nn.functional.pad(vector, (0, -vector.shape[-1] % tile)).unflatten(-1, (-1, tile))
    return tiles
