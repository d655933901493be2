"""Static atoms: rules of position alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.patterns.base import FOREVER, Atom, BlockRows


def _positions(values: tuple[Any, ...], name: str) -> tuple[int, ...]:
    bad = [value for value in values if type(value) is not int or not 0 <= value < FOREVER]
    require(not bad, f"{name} takes whole numbers from 0, got {bad[:3]}; positions count from the start of the document")
    return tuple(sorted(set(values)))


def _at_least(value: Any, least: int, name: str) -> None:
    good = type(value) is int and least <= value < FOREVER
    require(good, f"{name} must be a whole number from {least} to {FOREVER - 1}, got {value!r}")


@dataclass(frozen=True, repr=False)
class Dense(Atom):
    """Keep every key: causal attention."""

    name = "dense"

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def end(self, n: int) -> Tensor:
        return torch.full((n,), FOREVER)

    def merged(self, other: Atom) -> Atom | None:
        return None if other.dynamic else self

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [], {}


@dataclass(frozen=True, repr=False)
class Window(Atom):
    """Keep the `tokens` newest keys of each query, its own included (sliding window)."""

    tokens: int
    name = "window"

    def __post_init__(self) -> None:
        _at_least(self.tokens, 1, "window's tokens")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return i - j < self.tokens

    def end(self, n: int) -> Tensor:
        return (torch.arange(n) + self.tokens).clamp_max(FOREVER)

    def merged(self, other: Atom) -> Atom | None:
        return Window(max(self.tokens, other.tokens)) if isinstance(other, Window) else None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.tokens], {}


@dataclass(frozen=True, repr=False)
class Sink(Atom):
    """Keep the first `tokens` keys of the document (attention sinks, StreamingLLM)."""

    tokens: int
    name = "sink"

    def __post_init__(self) -> None:
        _at_least(self.tokens, 1, "sink's tokens")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return (j < self.tokens).expand(torch.broadcast_shapes(i.shape, j.shape))

    def end(self, n: int) -> Tensor:
        return torch.where(torch.arange(n) < self.tokens, FOREVER, 0)

    def merged(self, other: Atom) -> Atom | None:
        return Sink(max(self.tokens, other.tokens)) if isinstance(other, Sink) else None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.tokens], {}


@dataclass(frozen=True, repr=False)
class Columns(Atom):
    """Keep the keys at absolute positions `indices`, in rows from `start` on (DAM's vertical patterns)."""

    indices: tuple[int, ...]
    start: int = 0
    name = "columns"

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", _positions(self.indices, "columns"))
        require(bool(self.indices), "columns needs at least one position, as in columns(0, 17)")
        _at_least(self.start, 0, "columns' start")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.isin(j, torch.tensor(self.indices, device=j.device)) & (i >= self.start)

    def end(self, n: int) -> Tensor:
        ends = torch.zeros(n, dtype=torch.int64)
        ends[[index for index in self.indices if index < n]] = FOREVER
        return ends

    @property
    def corner_rows(self) -> int:
        return self.start

    def merged(self, other: Atom) -> Atom | None:
        if isinstance(other, Columns) and other.start == self.start:
            return Columns(self.indices + other.indices, self.start)
        return None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return list(self.indices), {"start": self.start} if self.start else {}


@dataclass(frozen=True, repr=False)
class Diagonals(Atom):
    """Keep the keys at distances `distances` before the query, in rows from `start` on (DAM's diagonal patterns)."""

    distances: tuple[int, ...]
    start: int = 0
    name = "diagonals"

    def __post_init__(self) -> None:
        object.__setattr__(self, "distances", _positions(self.distances, "diagonals"))
        require(bool(self.distances), "diagonals needs at least one distance, as in diagonals(0, 1, 128)")
        _at_least(self.start, 0, "diagonals' start")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.isin(i - j, torch.tensor(self.distances, device=j.device)) & (i >= self.start)

    def offsets(self, n: int) -> Tensor:
        kept = torch.zeros(n, dtype=torch.bool)
        kept[[distance for distance in self.distances if distance < n]] = True
        return kept

    @property
    def corner_rows(self) -> int:
        return self.start

    def merged(self, other: Atom) -> Atom | None:
        if isinstance(other, Diagonals) and other.start == self.start:
            return Diagonals(self.distances + other.distances, self.start)
        return None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return list(self.distances), {"start": self.start} if self.start else {}


@dataclass(frozen=True, repr=False)
class Dilated(Atom):
    """Keep `tokens` keys spaced `step` apart, the query's own the newest (Longformer's dilated window)."""

    tokens: int
    step: int
    name = "dilated"

    def __post_init__(self) -> None:
        _at_least(self.tokens, 1, "dilated's tokens")
        _at_least(self.step, 1, "dilated's step")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j) % self.step == 0) & (i - j < self.tokens * self.step)

    def offsets(self, n: int) -> Tensor:
        distance = torch.arange(n)
        return (distance % self.step == 0) & (distance < self.tokens * self.step)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.tokens], {"step": self.step}


@dataclass(frozen=True, repr=False)
class RandomBlocks(Atom):
    """Keep `count` random earlier blocks of `block` tokens for every row of blocks (BigBird).

    The choice depends on `seed` and the row of blocks alone, so a longer text never changes it.
    """

    count: int
    block: int
    seed: int
    name = "random_blocks"

    def __post_init__(self) -> None:
        _at_least(self.count, 1, "random_blocks' count")
        _at_least(self.block, 1, "random_blocks' block")
        _at_least(self.seed, 0, "random_blocks' seed")

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        rows = int(i.max()) // self.block + 1 if i.numel() else 0
        chosen = torch.zeros(rows, rows, dtype=torch.bool)
        for row in range(rows):
            chosen[row, list(_random_row(self.count, self.seed, row))] = True
        inside = j <= i
        key_block = torch.where(inside, j, 0) // self.block
        return chosen.to(j.device)[i // self.block, key_block] & inside

    def blocks(self, n: int) -> BlockRows:
        rows = [_random_row(self.count, self.seed, row) for row in range(-(-n // self.block))]
        index = torch.full((len(rows), min(self.count, len(rows))), -1)
        for row, chosen in enumerate(rows):
            index[row, : len(chosen)] = torch.tensor(chosen)
        return BlockRows(self.block, torch.tensor([len(chosen) for chosen in rows]), index)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.count], {"block": self.block, "seed": self.seed}


@lru_cache(maxsize=1 << 16)
def _random_row(count: int, seed: int, row: int) -> tuple[int, ...]:
    generator = np.random.Generator(np.random.Philox(key=seed, counter=row))
    return tuple(sorted(int(block) for block in generator.choice(row + 1, size=min(count, row + 1), replace=False)))
