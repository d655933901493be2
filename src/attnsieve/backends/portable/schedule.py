"""Which keys a tile of query rows has to read, found once per layout.

A tile covers the absolute rows [t * TILE, (t + 1) * TILE). Rows never depend on later text, so the same lists serve any
chunk of queries and any sequence that uses the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.layout import Layout

TILE = 128
# How much dearer one multiply-add is on the per-row path than in a matrix product (measured 6 to 14 on two cores).
ROW_COST = 10


@dataclass(frozen=True, eq=False)
class Tile:
    """Keys of one tile of rows for one head; int64, ascending.

    full: kept by every row. partial: kept by some rows, `Layout.keep` decides per pair. distances: scattered diagonals, whose
    cells are read row by row (key = row - distance) unless full or partial keys hold them already.
    """

    full: Tensor
    partial: Tensor
    distances: Tensor


def mask_groups(layout: Layout, z: int, heads: range) -> list[list[int]]:
    """`heads` of the layout, those with equal masks together, so that they can share gathered keys and one product."""
    return layout.schedule(("portable", z, heads), lambda: _group(layout, z, heads))


def _group(layout: Layout, z: int, heads: range) -> list[list[int]]:
    groups: list[list[int]] = []
    for h in heads:
        for group in groups:
            if _equal_masks(layout, z, group[0], h):
                group.append(h)
                break
        else:
            groups.append([h])
    return groups


def _equal_masks(layout: Layout, z: int, one: int, other: int) -> bool:
    vectors = [layout.end[z]]
    vectors += [] if layout.offset is None else [layout.offset[z]]
    vectors += [] if layout.blocks is None else [layout.blocks.count[z], layout.blocks.index[z]]
    if layout.corner is not None and layout.corner_rows is not None:
        vectors += [layout.corner, layout.corner_rows]
    return all(torch.equal(vector[one], vector[other]) for vector in vectors)


def tile_of(layout: Layout, z: int, h: int, t: int) -> Tile:
    """The schedule of tile `t` of layout head `h`, built on first use."""
    return layout.schedule(("portable", z, h, t), lambda: _build(layout, z, h, t))


def scattered_distances(layout: Layout, z: int, h: int) -> tuple[Tensor, Tensor]:
    """(scattered, bands): int64 [S] single distances cheaper row by row, int64 [N, 2] runs (first, last) cheaper as tiles."""
    return layout.schedule(("portable", z, h), lambda: _split_distances(layout, z, h))


def _split_distances(layout: Layout, z: int, h: int) -> tuple[Tensor, Tensor]:
    scattered: list[int] = []
    bands: list[tuple[int, int]] = []
    for run in _runs([] if layout.offset is None else layout.offset[z, h].nonzero().flatten().tolist()):
        if TILE + run[-1] - run[0] < ROW_COST * len(run):
            bands.append((run[0], run[-1]))
        else:
            scattered += run
    device = layout.device
    return torch.tensor(scattered, dtype=torch.int64, device=device), torch.tensor(bands, device=device).reshape(-1, 2)


def _runs(distances: list[int]) -> list[list[int]]:
    """Ascending distances cut where the gap makes a joint tile wasteful."""
    runs: list[list[int]] = []
    for distance in distances:
        if runs and distance - runs[-1][-1] <= ROW_COST:
            runs[-1].append(distance)
        else:
            runs.append([distance])
    return runs


def _build(layout: Layout, z: int, h: int, t: int) -> Tile:
    first, stop = t * TILE, min((t + 1) * TILE, layout.length)
    keys = torch.arange(stop, device=layout.device)
    end = layout.end[z, h, :stop]
    scattered, bands = scattered_distances(layout, z, h)
    corner = 0 if layout.corner_rows is None else int(layout.corner_rows[h])
    touched = (end > keys.clamp_min(first)) if stop > corner else torch.zeros_like(keys, dtype=torch.bool)
    full = touched & (keys <= first) & (end >= stop) & (first >= corner)
    if stop > corner:
        for low, high in bands.tolist():
            touched[max(0, first - high) : max(0, stop - low)] = True
        touched |= _in_blocks(layout, z, h, first, stop)
    if first < corner:
        rows = torch.arange(first, min(stop, corner), device=layout.device)
        touched |= layout.keep(z, h, rows[:, None], keys[None, :]).any(0)
    return Tile(full.nonzero().flatten(), (touched & ~full).nonzero().flatten(), scattered[scattered < stop])


def _in_blocks(layout: Layout, z: int, h: int, first: int, stop: int) -> Tensor:
    touched = torch.zeros(stop, dtype=torch.bool, device=layout.device)
    if layout.blocks is not None:
        rows, keys = layout.blocks.rows, layout.blocks.keys
        listed = layout.blocks.index[z, h, first // rows : -(-stop // rows)].long()
        block = torch.arange(-(-stop // keys), device=layout.device)
        touched |= torch.isin(block, listed).repeat_interleave(keys)[:stop]
    return touched
