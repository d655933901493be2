"""The work of a call, cut into parts: one tile of query rows of one mask in the sequences that share their slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.portable.schedule import TILE, Tile, mask_groups, tile_of
from attnsieve.layout import Layout


@dataclass(frozen=True, eq=False)
class Slots:
    """Sequences with equal slots: batch rows, first query and key slot, lengths, and the layout's sequence index."""

    batch: list[int]
    q_start: int
    q_len: int
    k_start: int
    k_len: int
    z: int


@dataclass(frozen=True, eq=False)
class Part:
    """Query heads `heads` of one KV head at `rows`; M rows, U tile keys (full, then partial), S scattered diagonals.

    mask: bool [M, U - full], or None where every pair is kept. row_keys, row_mask: [M, S], None without diagonals.
    """

    heads: list[int]
    rows: Tensor
    keys: Tensor
    full: int
    mask: Tensor | None
    row_keys: Tensor | None
    row_mask: Tensor | None


def slots_of(call: Call) -> list[Slots]:
    """Sequences of the call, those that can be computed together as one. Reads the device once."""
    groups: dict[tuple[int, int, int, int, int], list[int]] = {}
    for s, (b, q0, nq, k0, nk) in enumerate(call.spans.rows()):
        groups.setdefault((q0, nq, k0, nk, s if call.layout.sequences > 1 else 0), []).append(b)
    return [Slots(batch, *key) for key, batch in groups.items() if key[1] > 0]


def parts_of(call: Call, slots: Slots, kv_head: int) -> Iterator[Part]:
    """The parts of one KV head in `slots`."""
    layout = call.layout
    shared = call.q.shape[1] // layout.heads
    layout_heads = range(kv_head * call.group // shared, max((kv_head + 1) * call.group // shared, 1))
    first_row = slots.k_len - slots.q_len
    for group in mask_groups(layout, slots.z, layout_heads):
        heads = [h * shared + member for h in group for member in range(shared)]
        for t in range(first_row // TILE, -(-slots.k_len // TILE)):
            rows = torch.arange(max(t * TILE, first_row), min((t + 1) * TILE, slots.k_len), device=layout.device)
            tile = tile_of(layout, slots.z, group[0], t) if slots.q_len > 1 else _row_tile(layout, slots.z, group[0], first_row)
            yield _part(layout, slots, group[0], heads, rows, tile)


def _row_tile(layout: Layout, z: int, h: int, row: int) -> Tile:
    """A decode step reads exactly the keys of its row; lists for the whole tile would be built for one use."""
    keys = torch.arange(row + 1, device=layout.device)
    kept = layout.keep(z, h, torch.tensor([[row]], device=keys.device), keys[None, :])[0]
    return Tile(keys[kept], keys[:0], keys[:0])


def _part(layout: Layout, slots: Slots, h: int, heads: list[int], rows: Tensor, tile: Tile) -> Part:
    partial = tile.partial[tile.partial < slots.k_len]
    keys = torch.cat([tile.full, partial])
    mask = _mask(layout, slots.z, h, rows, partial) if len(partial) else None
    if not len(tile.distances):
        return Part(heads, rows, keys, len(tile.full), mask, None, None)
    row_keys = rows[:, None] - tile.distances[None, :]
    inside = row_keys >= 0
    row_keys = row_keys.clamp_min(0)
    listed = torch.zeros(slots.k_len, dtype=torch.bool, device=rows.device)
    listed[keys] = True
    row_mask = inside & ~listed[row_keys] & layout.keep(slots.z, h, rows[:, None], row_keys)
    return Part(heads, rows, keys, len(tile.full), mask, row_keys, row_mask)


def _mask(layout: Layout, z: int, h: int, rows: Tensor, keys: Tensor) -> Tensor:
    plain = layout.offset is None and layout.blocks is None and layout.corner is None
    if plain:
        return (rows[:, None] < layout.end[z, h][keys]) & (keys <= rows[:, None])
    return layout.keep(z, h, rows[:, None], keys[None, :])
