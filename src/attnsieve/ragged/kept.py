"""Kept: which keys of one layer a later row can still read, per KV head, and where they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attnsieve.backends.ragged import Heads, Index
from attnsieve.errors import UserError, require
from attnsieve.patterns import FOREVER, Atom, Pattern

# Query heads of a group are bits of an int32.
MOST_HEADS = 32
# Places that one program of a decode step goes through at least.
LEAST_SHARE = 64


@dataclass(frozen=True, eq=False)
class HeadKept:
    """One KV head. columns: positions that no row drops, ascending. distances: distances that rows keep, ascending.

    Bit r of `column_bits` [columns] and `distance_bits` [reach] says whether query head r of the group keeps it.
    """

    columns: Tensor
    column_bits: Tensor
    distances: Tensor
    distance_bits: Tensor
    own: int

    @property
    def reach(self) -> int:
        """Slots of the ring: the newest positions, up to the farthest distance that any row reads."""
        return len(self.distance_bits)

    @property
    def slots(self) -> int:
        return self.own + self.reach

    @property
    def window(self) -> int:
        """Distances kept without a hole from 0 on."""
        holes = (self.distance_bits == 0).nonzero()
        return int(holes[0]) if len(holes) else self.reach


@dataclass(frozen=True, eq=False)
class Kept:
    """What has to be stored so that every row from `corner` on finds the keys that it keeps, up to `capacity` positions.

    A key is dropped once no later row reads it. Whatever holes its distances have, every key comes to the farthest of them
    some day, so a ring of that many positions is the least; columns stay for ever.
    """

    heads: tuple[HeadKept, ...]
    capacity: int
    corner: int

    @classmethod
    def of(cls, row: Sequence[Pattern], kv_heads: int, capacity: int) -> Self:
        """From one pattern per query head. Raises UserError with the reason for patterns that may read any earlier key."""
        require(capacity > 0, f"a cache must have room for at least one token, got {capacity}")
        group = len(row) // kv_heads
        require(group <= MOST_HEADS, f"{group} query heads share a KV head, at most {MOST_HEADS} can")
        rules = {pattern: _rule(pattern, capacity) for pattern in dict.fromkeys(row)}
        groups = [[rules[pattern] for pattern in row[h * group : (h + 1) * group]] for h in range(kv_heads)]
        return cls(tuple(_united(rules) for rules in groups), capacity, max(pattern.corner_rows for pattern in row))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def slots(self) -> int:
        """Keys stored per batch row, over all KV heads."""
        return sum(head.slots for head in self.heads)

    @property
    def share(self) -> float:
        """Stored keys over those of a dense cache of the same capacity."""
        return self.slots / (len(self.heads) * self.capacity)

    def index(self, device: torch.device, programs: int) -> Index:
        """The vectors that decode reads, on `device`, its work shared between about `programs` programs."""
        heads = self.heads
        columns, far = [head.columns for head in heads], [head.distances[head.window :] for head in heads]
        column_bits, distance_bits = [head.column_bits for head in heads], [head.distance_bits for head in heads]
        items = _items(heads, programs)
        vectors = (
            _before(head.slots for head in heads),
            [head.own for head in heads],
            [head.reach for head in heads],
            [len(head.columns) for head in heads],
            [head.window for head in heads],
            [len(head.distances) for head in heads],
            *_starts(columns, far),
            *_starts(column_bits, distance_bits),
        )
        return Index(
            Heads(*(_int32(vector).to(device) for vector in vectors)),
            _int32(torch.cat([*columns, *far, torch.zeros(1)])).to(device),
            _wrapped(torch.cat([*column_bits, *distance_bits])).to(device),
            torch.tensor([item for part in items for item in part], dtype=torch.int32).to(device),
            _int32([*_before(len(part) for part in items), sum(len(part) for part in items)]).to(device),
        )


def _items(heads: Sequence[HeadKept], programs: int) -> list[list[tuple[int, int, int, int]]]:
    """Per KV head its shares of work, all of about the same length; see `Index.items`."""
    sizes = [(len(head.columns), len(head.distances)) for head in heads]
    step = max(LEAST_SHARE, -(-sum(map(sum, sizes)) // programs // LEAST_SHARE) * LEAST_SHARE)
    return [
        [
            (h, kind, first, min(first + step, size))
            for kind, size in ((1, n_columns), (0, n_distances))
            for first in range(0, size, step)
        ]
        for h, (n_columns, n_distances) in enumerate(sizes)
    ]


@dataclass(frozen=True, eq=False)
class _Rule:
    """bool [capacity] each: positions kept for ever, distances kept."""

    forever: Tensor
    distance: Tensor


def _rule(pattern: Pattern, n: int) -> _Rule:
    """Columns and distances of the rows beyond the corner."""
    forever, distance = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for atom in pattern:
        if atom.dynamic:
            raise UserError(f"{atom} chooses its keys from the input, any earlier key may be chosen")
        if atom.blocks(n) is not None:
            raise UserError(f"{atom} may read any earlier key")
        offsets, end = atom.offsets(n), atom.end(n)
        if offsets is not None:
            distance |= offsets
        if end is not None:
            forever |= end >= FOREVER
            distance[: _window(atom, end)] = True
    return _Rule(torch.zeros_like(forever), torch.ones_like(distance)) if bool(forever.all()) else _Rule(forever, distance)


def _window(atom: Atom, end: Tensor) -> int:
    """Rows for which an atom keeps the keys that it drops at all; must be the same for all of them."""
    life = torch.where(end < FOREVER, end - torch.arange(len(end)), 0).clamp_min_(0)
    longest = int(life.max())
    if longest and not bool(((life == longest) | (end >= FOREVER)).all()):
        raise UserError(f"{atom} keeps some keys longer than others")
    return longest


def _united(rules: Sequence[_Rule]) -> HeadKept:
    """What the query heads of a group keep together."""
    forever, distance = (
        sum(flags.long() << r for r, flags in enumerate(parts))
        for parts in ([rule.forever for rule in rules], [rule.distance for rule in rules])
    )
    assert isinstance(forever, Tensor)
    assert isinstance(distance, Tensor)
    columns, distances = forever.nonzero().flatten(), distance.nonzero().flatten()
    # The newest key is always stored: the ring has a slot at least.
    reach = int(distances[-1]) + 1 if len(distances) else 1
    own = 0 if reach == len(forever) else len(columns)
    return HeadKept(columns, forever[columns], distances, distance[:reach], own)


def _before(sizes: Iterable[int], start: int = 0) -> list[int]:
    """Where parts of these sizes begin, one after the other."""
    starts = []
    for size in sizes:
        starts.append(start)
        start += size
    return starts


def _starts(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Where each tensor begins if all of `first` and then all of `second` are joined."""
    starts = _before(len(part) for part in [*first, *second])
    return starts[: len(first)], starts[len(first) :]


def _int32(values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values).to(torch.int32)


def _wrapped(words: Tensor) -> Tensor:
    """int32 with the same low 32 bits."""
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
