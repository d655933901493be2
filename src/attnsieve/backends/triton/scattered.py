"""Which diagonals of a layout lie alone: a tile of keys that they cross keeps hardly any of its pairs.

A tile of 64 x 64 scores takes as long as some 240 pairs one by one (120 when `_SHARING` was chosen), and a diagonal crosses two tiles
of each row of tiles. So diagonals pay by tiles where several of them share those. Scattered ones are attended to pair by pair
(`diagonals`), the rest of the layout by tiles, or by lists of single keys where the kernels for Hopper GPUs serve those: there they
take less time. Only prefill makes that difference: gradients go by tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton import hopper
from attnsieve.backends.triton.schedule import beyond_end, longest_row
from attnsieve.layout import Layout

# Diagonals that share a tile lie less than this apart; as many as `_SHARING` of them are worth a tile.
_APART = 64
_SHARING = 6
# A few that share tiles go along with many that do not: masks without diagonals have faster tiles.
_FEW = 0.25
# Scattered diagonals of a head below which passing on what tiles have summed up takes longer than their tiles.
_LEAST = 16
_WIDTHS = (64, 128)
# Lists took less time than tiles where rows keep 3.5 and 4.7 % of the keys; up to this share that is assumed. They take room: half a
# gigabyte for so many.
_LISTED_SHARE = 0.125
_MOST_LISTED = 2**32


@dataclass(frozen=True)
class Scattered:
    """A layout in two parts, which share no pair.

    offsets: int32 [H, room], the scattered distances of each head in ascending order, beyond them and at the end one that no
    position has. rest: the layout without them, with `most_keys` where lists of single keys are to serve it.
    """

    offsets: Tensor
    rest: Layout

    def below(self, positions: int) -> Tensor:
        """int32 [2, H, tiles]: for query tiles of `positions`, how many offsets lead all rows of a tile to keys, and how many its last
        row; the others lead to places before the text."""
        key = ("triton offsets below", positions)
        # Kept with the rest: the layout itself, which keeps this, would keep itself.
        return self.rest.schedule(key, lambda: _below(self.offsets, self.rest.length, positions))

    def rows(self, first: int, stop: int) -> float:
        """Pairs of the diagonals in query positions first to stop - 1, a mean over heads. Reads the device."""
        reach = (stop - self.offsets.clamp(first, stop)).sum(1)
        return float(reach.double().mean())


def scattered(call: Call) -> Scattered | None:
    """The parts of a call's layout, None where it has few scattered diagonals or where tiles serve them: layouts chosen for one call
    or per sequence, float32, other widths. Reads the device when a layout is first used."""
    layout, width = call.layout, call.q.shape[-1]
    if layout.offset is None or layout.passing or layout.sequences > 1 or layout.blocks is not None:
        return None
    if call.q.element_size() != 2 or width not in _WIDTHS or call.v.shape[-1] != width:
        return None
    listed = hopper.is_wide_enough(call) and hopper.is_there(call)
    return layout.schedule(("triton scattered", listed), lambda: _split(layout, listed))


def _split(layout: Layout, listed: bool) -> Scattered | None:
    assert layout.offset is not None
    offset = layout.offset[0]
    n, distances = layout.length, torch.arange(layout.length, dtype=torch.int32, device=layout.device)
    before = F.pad(offset.cumsum(1, dtype=torch.int32), (1, 0))
    near = before[:, (distances + _APART).clamp_max(n)] - before[:, (distances - _APART + 1).clamp_min(0)]
    alone = offset & (near < _SHARING)
    if float((offset & ~alone).sum()) <= _FEW * float(alone.sum()):
        alone = offset
    counts = alone.sum(1)
    if float(counts.double().mean()) < _LEAST:
        return None
    room = int(counts.max())
    sorted_ = torch.where(alone, distances, n).sort(dim=1).values[:, :room]
    rest = replace(layout, offset=layout.offset & ~alone if bool((offset & ~alone).any()) else None)
    return Scattered(F.pad(sorted_, (0, 1), value=n).contiguous(), _listed(rest) if listed else rest)


def _listed(rest: Layout) -> Layout:
    """The layout as one that lists serve, if they can and it pays."""
    if beyond_end(rest):
        return rest
    most = int(longest_row(rest.end))
    few = most <= _LISTED_SHARE * rest.length and most * rest.length * rest.heads <= _MOST_LISTED
    return replace(rest, most_keys=most) if few else rest


def _below(offsets: Tensor, length: int, positions: int) -> Tensor:
    first = torch.arange(0, length, positions, dtype=torch.int32, device=offsets.device)
    rows = torch.stack([first, first + positions - 1]).clamp_max(length - 1)
    counts = [torch.searchsorted(offsets, row.expand(len(offsets), -1).contiguous(), right=True) for row in rows]
    return torch.stack(counts).int()
