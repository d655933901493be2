"""Layout: the patterns of one layer compiled to vectors, the only thing a kernel sees.

Shapes: Z is 1 (static) or the number of sequences in the call's spans (chosen from the input), H the layout's heads (query
heads, or KV heads when the heads of a group share a mask), n the capacity in positions, L the corner rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import gcd
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from attnsieve.device import on_device_of
from attnsieve.errors import require
from attnsieve.patterns import FOREVER, BlockRows, Pattern
from attnsieve.patterns.corner import pack_bits

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
        """int64 [Z, H]: kept (query, key) pairs among the first `n` positions, counted exactly without n x n memory."""
        n = self.length if n is None else n
        require(0 < n <= self.length, f"can count 1 to {self.length} positions, got {n}")
        counts = [[self._pairs_of_head(z, h, n) for h in range(self.heads)] for z in range(self.sequences)]
        return torch.tensor(counts)

    def density(self, n: int | None = None) -> Tensor:
        """float64 [Z, H]: kept pairs over all causal pairs of the first `n` positions."""
        n = self.length if n is None else n
        return self.pairs(n).double() / (n * (n + 1) / 2)

    def _pairs_of_head(self, z: int, h: int, n: int) -> int:
        first = 0 if self.corner_rows is None else min(int(self.corner_rows[h]), n)
        rows, keys = torch.arange(first, device=self.device), torch.arange(n, device=self.device)
        in_corner = self.keep(z, h, rows[:, None], rows[None, :]).sum() if first else 0
        end = self.end[z, h, :n].long()
        by_end = (end.clamp_max(n) - keys.clamp_min(first)).clamp_min(0).sum()
        count = _Counted(end, first, self._distances_below(z, h, n))
        by_offset = count.by_offset(keys, torch.full_like(keys, n)).sum()
        return int(in_corner + by_end + by_offset + self._pairs_only_in_blocks(z, h, n, count))

    def _distances_below(self, z: int, h: int, n: int) -> Tensor:
        """int64 [n + 1]: how many kept distances are below each distance."""
        kept = self.end.new_zeros(n) if self.offset is None else self.offset[z, h, :n]
        return torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))

    def _pairs_only_in_blocks(self, z: int, h: int, n: int, count: _Counted) -> Tensor | int:
        """Pairs in listed blocks that neither `end` nor `offset` keeps."""
        if self.blocks is None:
            return 0
        size, width = self.blocks.rows, self.blocks.keys
        listed = self.blocks.index[z, h].long()
        block_row = torch.arange(len(listed), device=self.device)[:, None, None]
        keys = listed[..., None] * width + torch.arange(width, device=self.device)
        real = (listed >= 0)[..., None] & (keys < n)
        keys = torch.where(real, keys, 0)
        start, stop = (block_row * size).clamp_max(n), ((block_row + 1) * size).clamp_max(n)
        lowest = torch.maximum(count.lowest_row(keys), start)
        rows = (stop - lowest).clamp_min(0) - count.by_offset(keys, stop, lowest)
        return torch.where(real, rows, 0).sum()


@dataclass(frozen=True, eq=False)
class _Counted:
    """Counts of rows that see a key by distance alone: end int64 [n], the first row of the rule, kept distances below each."""

    end: Tensor
    first: int
    below: Tensor

    def lowest_row(self, keys: Tensor) -> Tensor:
        """The first row from which `keys` are no longer kept by `end`."""
        return torch.maximum(self.end[keys], keys.clamp_min(self.first))

    def by_offset(self, keys: Tensor, stop: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Rows in [lowest, stop) that keep `keys` by distance; lowest defaults to `lowest_row`."""
        lowest = torch.minimum(self.lowest_row(keys) if lowest is None else lowest, stop)
        return self.below[(stop - keys).clamp_min(0)] - self.below[(lowest - keys).clamp_min(0)]


def compile(patterns: Sequence[Pattern], length: int, device: torch.device | str = "cpu") -> Layout:  # noqa: A001
    """The layout of one layer from one static pattern per head, for positions 0 .. length - 1.

    Raises UserError for an empty list, a length below 1 or a pattern that chooses keys from the input.
    """
    require(len(patterns) > 0, "compile needs one pattern per head, got none")
    require(0 < length < FOREVER, f"a layout's length must be positive, got {length}")
    chosen = [str(pattern) for pattern in patterns if pattern.dynamic]
    require(not chosen, f"compile takes static patterns; {chosen[:1]} chooses its keys from the input")
    unique = {pattern: _head(pattern, length) for pattern in dict.fromkeys(patterns)}
    heads = [unique[pattern] for pattern in patterns]
    corner, corner_rows = _stack_corners(heads)
    layout = Layout(
        length,
        torch.stack([head.end for head in heads])[None],
        _stack_offsets(heads, length),
        corner,
        corner_rows,
        _stack_blocks([head.blocks for head in heads], length),
        windows=all(_one_window(head.end) for head in unique.values()),
    )
    return layout.to(device)


@dataclass(frozen=True)
class _Head:
    end: Tensor
    offset: Tensor | None
    corner: Tensor | None
    blocks: list[BlockRows]


def _head(pattern: Pattern, n: int) -> _Head:
    ends = [end for atom in pattern if (end := atom.end(n)) is not None]
    offsets = [offset for atom in pattern if (offset := atom.offsets(n)) is not None]
    blocks = [block for atom in pattern if (block := atom.blocks(n)) is not None]
    end = reduce(torch.maximum, ends, torch.zeros(n, dtype=torch.int64))
    rows = torch.arange(min(pattern.corner_rows, n))
    corner = pattern.keep(rows[:, None], rows[None, :]) if len(rows) else None
    return _Head(end.to(torch.int32), reduce(torch.logical_or, offsets) if offsets else None, corner, blocks)


def _one_window(end: Tensor) -> bool:
    """Whether every end, int32 [n], is FOREVER or what one window gives."""
    life = (end - torch.arange(len(end), dtype=torch.int32)).clamp_min(0)[end != FOREVER]
    return len(life) == 0 or bool((life == life[0]).all())


def _stack_offsets(heads: list[_Head], n: int) -> Tensor | None:
    if all(head.offset is None for head in heads):
        return None
    none = torch.zeros(n, dtype=torch.bool)
    return torch.stack([none if head.offset is None else head.offset for head in heads])[None]


def _stack_corners(heads: list[_Head]) -> tuple[Tensor | None, Tensor | None]:
    rows = [0 if head.corner is None else len(head.corner) for head in heads]
    largest = max(rows)
    if not largest:
        return None, None
    packed = torch.zeros(len(heads), largest, -(-largest // 8), dtype=torch.uint8)
    for h, head in enumerate(heads):
        if head.corner is not None:
            bits = torch.from_numpy(pack_bits(head.corner))
            packed[h, : bits.shape[0], : bits.shape[1]] = bits
    return packed, torch.tensor(rows, dtype=torch.int32)


def _stack_blocks(heads: list[list[BlockRows]], n: int) -> Blocks | None:
    sizes = [block.size for head in heads for block in head]
    if not sizes:
        return None
    size = reduce(gcd, sizes)
    lists = [[_blocks_of_row(head, row, size) for row in range(-(-n // size))] for head in heads]
    count = torch.tensor([[len(keys) for keys in rows] for rows in lists], dtype=torch.int32)
    index = torch.full((*count.shape, max(1, int(count.max()))), -1, dtype=torch.int32)
    for h, rows in enumerate(lists):
        for row, keys in enumerate(rows):
            index[h, row, : len(keys)] = torch.tensor(keys, dtype=torch.int32)
    return Blocks(size, size, count[None], index[None])


def _blocks_of_row(blocks: list[BlockRows], row: int, size: int) -> list[int]:
    """Key blocks of `size` tokens that a row of blocks keeps, ascending, each once, none after the row."""
    found: set[int] = set()
    for block in blocks:
        finer = block.size // size
        listed = block.index[row // finer, : int(block.count[row // finer])].tolist()
        found.update(key * finer + step for key in listed for step in range(finer))
    return sorted(key for key in found if key <= row)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
