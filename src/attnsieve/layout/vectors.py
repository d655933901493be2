"""Layout: the patterns of one layer compiled to vectors, the only thing a kernel sees.

Shapes: Z is 1 (static) or the number of sequences in the call's spans (chosen from the input), H the layout's heads (query
heads, or KV heads when the heads of a group share a mask), n the capacity in positions, L the corner rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from attnsieve.device import on_device_of
from attnsieve.errors import require
from attnsieve.layout.counting import pairs_of_head

T = TypeVar("T")


@dataclass(frozen=True)
class Blocks:
    """Blocks kept, listed per row of blocks: every causal pair inside a listed block is kept.

    A block is `rows` queries by `keys` keys, at multiples of both; keys=1 lists single keys for a block of queries.
    count: int32 [Z, H, nb]; index: int32 [Z, H, nb, K], numbers of key blocks, ascending, -1 beyond the count.
    """

    rows: int
    keys: int
    count: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> Blocks:
        """A copy on `device`."""
        return Blocks(self.rows, self.keys, self.count.to(device), self.index.to(device))


@dataclass(frozen=True, eq=False)
class Layout:
    """Which keys each query of a layer keeps, for positions 0 .. length - 1.

    Row i of head h keeps key j <= i iff

        i <  corner_rows[h]:  bit j of corner[h, i]
        i >= corner_rows[h]:  i < end[z, h, j]  or  offset[z, h, i - j]  or  block (i // rows, j // keys) is listed

    end: int32 [Z, H, n], the first row that no longer sees the key. offset: bool [Z, H, n] by distance, or None.
    corner: uint8 [H, L, ceil(L / 8)], first key in the lowest bit, or None; corner_rows: int32 [H].
    A row never depends on how many rows follow, so one layout serves prefill, chunks and decode steps up to its length.
    most_keys: no row keeps more keys than this by `end`, if the host knows; kernels then size their lists without reading
    the device. passing: made for one call, so that nothing is worth reading back to learn more about it. windows: the host knows
    that every end is FOREVER, or what one window per sequence and head gives (j + w, or no row for all such keys).
    """

    length: int
    end: Tensor
    offset: Tensor | None = None
    corner: Tensor | None = None
    corner_rows: Tensor | None = None
    blocks: Blocks | None = None
    most_keys: int | None = None
    passing: bool = False
    windows: bool = False
    # Of these vectors and no others: `replace` and copies begin with none.
    schedules: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied; compiled kernels cannot be."""
        return {**self.__dict__, "schedules": {}}

    def __post_init__(self) -> None:
        require(self.end.dtype == torch.int32 and self.end.ndim == 3, f"end must be int32 [Z, H, n], got {_kind(self.end)}")
        require(self.end.shape[-1] == self.length, f"end covers {self.end.shape[-1]} keys, the layout has {self.length}")
        if self.offset is not None:
            good = self.offset.dtype == torch.bool and self.offset.shape == self.end.shape
            require(good, f"offset must be bool {tuple(self.end.shape)}, got {_kind(self.offset)}")
        require((self.corner is None) == (self.corner_rows is None), "corner and corner_rows come together")

    @property
    def heads(self) -> int:
        return self.end.shape[1]

    @property
    def sequences(self) -> int:
        """Z: 1, or the number of sequences where each has masks of its own."""
        return self.end.shape[0]

    @property
    def device(self) -> torch.device:
        return self.end.device

    def schedule(self, key: Hashable, build: Callable[[], T]) -> T:
        """What a backend derives from this layout, built once per `key`, on the layout's device."""
        if key not in self.schedules:
            with on_device_of(self.end):
                self.schedules[key] = build()
        return cast(T, self.schedules[key])

    def to(self, device: torch.device | str) -> Layout:
        """A copy on `device`; self if it is there already."""
        if torch.device(device) == self.device:
            return self
        blocks = self.blocks and self.blocks.to(device)
        offset, corner, rows = (
            None if part is None else part.to(device) for part in (self.offset, self.corner, self.corner_rows)
        )
        return replace(self, end=self.end.to(device), offset=offset, corner=corner, corner_rows=rows, blocks=blocks)

    def keep(self, z: int, h: int, i: Tensor, j: Tensor) -> Tensor:
        """bool: whether query positions `i` keep key positions `j` (int64, broadcastable, below `length`)."""
        inside = j <= i
        distance = torch.where(inside, i - j, 0)
        kept = i < self.end[z, h][j]
        if self.offset is not None:
            kept = kept | self.offset[z, h][distance]
        if self.blocks is not None:
            kept = kept | self._in_block(z, h, i, j)
        if self.corner is not None and self.corner_rows is not None:
            kept = torch.where(i < self.corner_rows[h], self._in_corner(h, i, j), kept)
        return kept & inside

    def _in_block(self, z: int, h: int, i: Tensor, j: Tensor) -> Tensor:
        assert self.blocks is not None
        table = self.schedule(("block table", z, h), lambda: self.block_table(z, h))
        return table[i // self.blocks.rows, j // self.blocks.keys]

    def block_table(self, z: int, h: int) -> Tensor:
        """bool [rows of blocks, key blocks + 1], the last column for the padding of the lists."""
        assert self.blocks is not None
        listed, width = self.blocks.index[z, h].long(), -(-self.length // self.blocks.keys)
        table = torch.zeros(len(listed), width + 1, dtype=torch.bool, device=self.device)
        return table.scatter_(1, torch.where(listed < 0, width, listed), True)

    def _in_corner(self, h: int, i: Tensor, j: Tensor) -> Tensor:
        assert self.corner is not None
        last = self.corner.shape[1] - 1
        row, key = i.clamp_max(last), j.clamp_max(last)
        return (self.corner[h][row, key // 8] >> (key % 8)) & 1 > 0

    def dense(self, rows: Tensor, keys: Tensor) -> Tensor:
        """bool [Z, H, rows, keys]: the mask written out, for oracles and small pictures."""
        heads = [[self.keep(z, h, rows[:, None], keys[None, :]) for h in range(self.heads)] for z in range(self.sequences)]
        return torch.stack([torch.stack(row) for row in heads])

    def pairs(self, n: int | None = None) -> Tensor:
        """int64 [Z, H]: kept (query, key) pairs among the first `n` positions (default: all), counted exactly without n x n
        memory. Raises UserError for more positions than the layout has."""
        n = self.length if n is None else n
        require(0 < n <= self.length, f"can count 1 to {self.length} positions, got {n}")
        counts = [[pairs_of_head(self, z, h, n) for h in range(self.heads)] for z in range(self.sequences)]
        return torch.tensor(counts)

    def density(self, n: int | None = None) -> Tensor:
        """float64 [Z, H]: `pairs` over all causal pairs of the first `n` positions."""
        n = self.length if n is None else n
        return self.pairs(n).double() / (n * (n + 1) / 2)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
