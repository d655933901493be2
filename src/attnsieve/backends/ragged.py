"""Decode over ragged storage: every KV head has slots of its own number, and one query reads only those it keeps.

A KV head's slots are its kept columns, ascending, then a ring of its `reach` newest positions: position j lies in ring slot
j % reach. Its places, in the order in which they are read, are its columns and then its kept distances, ascending.

A query head serves a place if it keeps it itself (`bits`): a distance always, a column unless it keeps the distance to it too.
So every key counts once per query head, wherever it is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """Where the keys of each KV head lie; int32 [Hkv].

    slot: its first slot. own: slots of columns (0: its columns are in the ring, which then holds every position). reach: slots
    of the ring. columns: number of columns. window: distances 0 .. window - 1 are kept. distances: number of kept distances.
    first_column, first_distance: where in `Index.entries` its columns, and its distances from `window` on, begin. column_bits,
    distance_bits: where in `Index.bits` those of its columns, and those of distance 0 .. reach - 1, begin.
    """

    slot: Any
    own: Any
    reach: Any
    columns: Any
    window: Any
    distances: Any
    first_column: Any
    first_distance: Any
    column_bits: Any
    distance_bits: Any


class Index(NamedTuple):
    """What decode reads beside keys. entries int32: columns and distances. bits int32: bit r says that query head r of the group
    keeps a column or distance. items int32 [items, 4]: shares of work as (KV head, 1 for columns or 0 for distances, first
    place, place after the last), those of a KV head from first_item[h] to first_item[h + 1]."""

    heads: Heads
    entries: Tensor
    bits: Tensor
    items: Tensor
    first_item: Tensor


class Memory(NamedTuple):
    """key [B, slots, D]; value [B, slots, Dv]; state int32 [B, Hkv, 2]: positions so far, and how many columns are below."""

    key: Any
    value: Any
    state: Any


def append(memory: Memory, index: Index, k: Tensor, v: Tensor) -> None:
    """Store the next token of every batch row; k [B, Hkv, 1, D], v [B, Hkv, 1, Dv]."""
    heads, (position, rank) = index.heads, memory.state.unbind(-1)
    ring = heads.slot + heads.own + position % heads.reach
    more = rank < heads.columns
    at_column = more & (index.entries[torch.where(more, heads.first_column + rank, 0)] == position)
    # The key of a column goes to two slots; of others, twice to the same.
    column = torch.where(at_column & (heads.own > 0), heads.slot + rank, ring)
    row = torch.arange(len(k), device=k.device)[:, None]
    for slots in (ring, column):
        memory.key[row, slots] = k.squeeze(2)
        memory.value[row, slots] = v.squeeze(2)
    memory.state.add_(torch.stack([torch.ones_like(rank), at_column.to(rank.dtype)], dim=-1))


def attend(q: Tensor, memory: Memory, index: Index, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest position, already stored. q [B, Hq, 1, D]; out [B, Hq, 1, Dv] in q's dtype, LSE [B, Hq, 1].

    Gathers the kept keys of one KV head after the other. Reads `state` to leave out what no row has reached.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    table = torch.stack(index.heads, dim=1).tolist()
    grouped = q.squeeze(2).unflatten(1, (len(table), -1)).to(work)
    parts = [_head(grouped[:, h], memory, memory.state[:, h], Heads(*table[h]), index, scale) for h in range(len(table))]
    out, lse = (torch.stack(part, dim=1).flatten(1, 2)[:, :, None] for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def _head(q: Tensor, memory: Memory, state: Tensor, head: Heads, index: Index, scale: float) -> tuple[Tensor, Tensor]:
    columns, distances = _column_places(state, head, index), _distance_places(state, head, index)
    slots, bits = (torch.cat(parts, dim=1) for parts in zip(columns, distances, strict=True))
    query = torch.arange(q.shape[1], device=q.device)[:, None]
    kept = (bits[:, None] >> query) & 1 > 0
    row = torch.arange(len(q), device=q.device)[:, None]
    scores = (q @ memory.key[row, slots].to(q.dtype).mT * scale).masked_fill(~kept, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isfinite(), lse, 0.0)[..., None]).exp()
    value = memory.value[row, slots].to(q.dtype)
    # Values that are not finite reach the heads that keep them; as factors of 0 they would reach all.
    spoilt = ~value.isfinite().all(-1)
    out = weights @ value.masked_fill(spoilt[..., None], 0.0)
    return out.masked_fill((kept & spoilt[:, None]).any(-1, keepdim=True), torch.nan), lse


def _column_places(state: Tensor, head: Heads, index: Index) -> tuple[Tensor, Tensor]:
    """Slots of the columns and bits of the query heads that they serve, [B, columns reached by any row]."""
    newest, rank = state[:, :1] - 1, state[:, 1:]
    column = index.entries[head.first_column :][: int(rank.max())]
    place = torch.arange(len(column), device=column.device)
    slots = head.slot + (place if head.own else column % head.reach)
    distance = newest - column
    near = (distance >= 0) & (distance < head.reach)
    elsewhere = torch.where(near, index.bits[head.distance_bits + torch.where(near, distance, 0)], 0)
    bits = torch.where(place < rank, index.bits[head.column_bits :][: len(column)] & ~elsewhere, 0)
    return slots.expand(len(state), -1), bits


def _distance_places(state: Tensor, head: Heads, index: Index) -> tuple[Tensor, Tensor]:
    """Slots of the kept distances and bits of the query heads that they serve, [B, distances reached by any row]."""
    newest = state[:, :1].long() - 1
    far = index.entries[head.first_distance :][: head.distances - head.window]
    distance = torch.cat([torch.arange(head.window, device=far.device), far])
    distance = distance[: int((distance <= newest.max()).sum())]
    position = newest - distance
    bits = torch.where(position >= 0, index.bits[head.distance_bits + distance], 0)
    return head.slot + head.own + position % head.reach, bits
