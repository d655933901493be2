"""Isolated columns moved in front of K, so that rows which keep a thousand of them read eight tiles and not all.

A kept column is served twice, for different rows: by its own slot while its tile is visited for its neighbours' sake, and by a slot
in front from then on. Slots in front are sorted by the row from which they serve, so those that a query tile keeps are the first
ones. Query heads with masks of their own have stretches of their own in front of the K that they share; their lists lead to no
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnsieve.backends.fa4.lists import TileLists, lists_of_rule
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

# What a tile with a predicate takes, and copying a tile of K and V, in tiles kept whole: measured on an H100.
_PARTIAL, _COPY = 2.7, 5.0


@dataclass(frozen=True)
class Columns:
    """index int32 [Hkv, F]: positions to be copied in front of K, a stretch of F // (H // Hkv) for each layout head, padding
    included. rows int64 [H, F + n]: those that each slot serves, as `keep_by_rows` reads them. lists: tiles of those slots, the ones
    in front first."""

    index: Tensor
    rows: Tensor
    lists: TileLists


class _Work(NamedTuple):
    """Tiles visited by all rows of all heads: kept whole, and with a predicate. Scalars on the device."""

    whole: Tensor
    partial: Tensor


def move_columns(layout: Layout, heads: int, kv_heads: int, tile: int) -> Columns | None:
    """The columns of a layout made of `end` alone for `heads` query heads, or None where moving them costs more than it spares.
    Reads the device."""
    end, stretches = layout.end[0], layout.heads // kv_heads
    flagged, start = _leaving(end, tile)
    own = torch.where(flagged, start, end)
    served = _served(start, flagged, tile)
    plain, behind = _work(end, tile), _work(own, tile)
    in_front = _Work((served // tile).sum(), (served % tile > 0).sum())
    counts = torch.stack([*plain, *behind, *in_front, flagged.sum(-1).max()]).tolist()
    room = -(-counts[6] // tile) * tile
    spared = counts[0] - counts[2] - counts[4] + _PARTIAL * (counts[1] - counts[3] - counts[5])
    copied = (stretches * room + layout.length) // tile * kv_heads
    if not room or spared * (heads // layout.heads) < _COPY * copied:
        return None
    first_row = torch.where(flagged, start, FOREVER)
    order = first_row.argsort(dim=-1, stable=True)[:, :room]
    stretch = torch.arange(layout.heads, device=end.device) % stretches
    rows = torch.cat([_in_front(first_row.gather(-1, order), stretch, stretches), rows_by_end(own, stretches * room)], dim=-1)
    lists = lists_of_rule(Layout(layout.length, own[None]), tile)
    lists = _behind(lists, served[None], stretch * (room // tile), stretches * room // tile, tile)
    return Columns(order.to(torch.int32).view(kv_heads, -1), rows, lists)


def _leaving(end: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """bool [H, n]: columns that leave their slot, before the last row, in tiles that are not all columns. int32 [H, n]: the first
    row, at the start of a query tile, for which the tile of a key is no longer visited for other keys."""
    forever = end == FOREVER
    isolated = forever & ~_per_tile(forever, tile).all(-1).repeat_interleave(tile, dim=-1)[..., : end.shape[-1]]
    others = _per_tile(torch.where(isolated, 0, end), tile).amax(-1)
    after = torch.arange(1, others.shape[-1] + 1, device=end.device, dtype=torch.int32) * tile
    # Ends go up to FOREVER, which rounding up would overflow.
    rows = torch.maximum((others.clamp_max(FOREVER - tile) + tile - 1) // tile * tile, after)
    start = rows.to(torch.int32).repeat_interleave(tile, dim=-1)[..., : end.shape[-1]]
    return isolated & (start < end.shape[-1]), start


def _served(start: Tensor, flagged: Tensor, tile: int) -> Tensor:
    """int32 [H, T]: how many slots in front each query tile keeps."""
    tiles = -(-start.shape[-1] // tile)
    added = torch.zeros(len(start), tiles + 1, dtype=torch.int32, device=start.device)
    added.scatter_add_(-1, torch.where(flagged, start // tile, tiles).long(), torch.ones_like(start))
    return added[:, :tiles].cumsum(-1, dtype=torch.int32)


def _work(end: Tensor, tile: int) -> _Work:
    """The tiles of a layout made of `end` int32 [H, n] alone."""
    tiles = -(-end.shape[-1] // tile)
    number = torch.arange(tiles, device=end.device)
    last, first = (_per_tile(end.clamp_max(tiles * tile), tile).amax(-1), _per_tile(end, tile).amin(-1))
    visited = ((last + tile - 1) // tile - number).clamp_min(0).sum()
    whole = ((first // tile).clamp_max(tiles) - number - 1).clamp_min(0).sum()
    return _Work(whole, visited - whole)


def _in_front(first_row: Tensor, stretch: Tensor, stretches: int) -> Tensor:
    """int64 [H, F]: the slots in front, which serve from `first_row` int32 [H, C] on; none of other heads' stretches."""
    heads, room = first_row.shape
    rows = torch.zeros(heads, stretches, room, dtype=torch.int64, device=first_row.device)
    serving = first_row < FOREVER
    own = _packed(first_row.long() + stretches * room, torch.full_like(first_row, FOREVER))
    rows[torch.arange(heads, device=stretch.device), stretch] = torch.where(serving, own, 0)
    return rows.flatten(1)


def rows_by_end(end: Tensor, shift: int = 0) -> Tensor:
    """int64 [H, n]: the rows from key j to end[j], int32 [H, n], behind `shift` slots."""
    position = torch.arange(end.shape[-1], device=end.device)
    return _packed(position + shift, (end - position).clamp_min(0))


def _packed(first: Tensor, number: Tensor) -> Tensor:
    """Rows as predicates read them: first and number, both from 0 to FOREVER, in the halves of int64."""
    return (number.long() << 32) | first.long()


def _behind(lists: TileLists, served: Tensor, first: Tensor, shift: int, tile: int) -> TileLists:
    """Lists of tiles that `shift` tiles are put in front of, of which each query tile keeps the first `served` int32 [1, H, T]
    slots from tile `first` int64 [H] on."""
    first = first.to(torch.int32)[:, None].expand_as(served[0])[None]
    tail = (served % tile > 0).to(torch.int32)
    part_count, part = _before(tail, first + served // tile, lists.part_count, lists.part + shift)
    whole_count, whole = _before(served // tile, first, lists.whole_count, lists.whole + shift)
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
