"""The union of a static layout with what was chosen, in the vectors of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.errors import UserError
from attnsieve.layout import Blocks, Layout
from attnsieve.selection import fused
from attnsieve.selection.carriers import Carrier, index_of
from attnsieve.selection.sequence import Chosen, TableInParts

# Flags held at once where parts are joined: bounds memory, not the result.
FLAGS_AT_ONCE = 1 << 30


@dataclass(frozen=True, eq=False)
class Static:
    """The part of a layer's patterns that does not depend on the input. table: its blocks, bool [1, H, rows of blocks, key
    blocks], or None."""

    layout: Layout
    table: Tensor | None

    @classmethod
    def of(cls, layout: Layout) -> Static:
        """Kept for every call up to the layout's length."""
        if layout.blocks is None:
            return cls(layout, None)
        return cls(layout, torch.stack([layout.block_table(0, h)[:, :-1] for h in range(layout.heads)])[None])

    def first(self, n: int) -> Static:
        """What it says of the first `n` positions: a longer text never changes earlier rows."""
        base = self.layout
        parts: dict[str, Any] = {"length": n, "end": base.end[..., :n].contiguous()}
        if base.offset is not None:
            parts["offset"] = base.offset[..., :n].contiguous()
        if base.corner is not None and base.corner_rows is not None:
            rows = min(base.corner.shape[1], n)
            parts["corner"] = base.corner[:, :rows, : -(-rows // 8)].contiguous()
            parts["corner_rows"] = base.corner_rows.clamp_max(n)
        if base.blocks is None or self.table is None:
            return Static(replace(base, **parts), None)
        rows, keys = -(-n // base.blocks.rows), -(-n // base.blocks.keys)
        lists = (base.blocks.count[..., :rows].contiguous(), base.blocks.index[:, :, :rows].contiguous())
        parts["blocks"] = Blocks(base.blocks.rows, base.blocks.keys, *lists)
        return Static(replace(base, **parts), self.table[..., :rows, :keys])


@dataclass(frozen=True, eq=False)
class Part:
    """One choice. sequences: whose it is, None for all; first_row: position of their first query."""

    carrier: Carrier
    sequences: list[int] | None
    first_row: int
    chosen: Chosen

    def is_for_all(self, values: Tensor | TableInParts | None, shape: tuple[int, ...]) -> bool:
        """Whether values [S, C, ...] of this part's are those of all sequences and heads [Z, H] of a layout."""
        everyone = self.sequences is None and self.carrier.target is None and self.carrier.repeat == 1
        return everyone and values is not None and values.shape[:2] == shape[:2]

    def put(self, into: Tensor, values: Tensor) -> None:
        """Unite `into` [Z, H, ...] with values [S, C, ...], at this part's sequences and heads; values may be shorter."""
        values = values.repeat_interleave(self.carrier.repeat, dim=1) if self.carrier.repeat > 1 else values
        window = into[(slice(None), slice(None), *(slice(size) for size in values.shape[2:]))]
        values = values[(slice(None), slice(None), *(slice(size) for size in window.shape[2:]))]
        for place in [slice(None)] if self.sequences is None else [slice(z, z + 1) for z in self.sequences]:
            own = values if self.sequences is None or len(values) == 1 else values[self.sequences.index(place.start)][None]
            _unite(window[place], own, self.carrier.target)


def _unite(into: Tensor, values: Tensor, heads: tuple[int, ...] | None) -> None:
    """The larger of both, for end a later row, for bits their or."""
    if heads is None:
        torch.maximum(into, values, out=into)
        return
    index = index_of(heads, into.device)
    into.index_copy_(1, index, torch.maximum(into.index_select(1, index), values))


def join(static: Static, sequences: int, parts: Sequence[Part]) -> Layout:
    """One set of masks per sequence: the static layout's and every part's."""
    base, shape = static.layout, (sequences, static.layout.heads, static.layout.length)
    end = _united(base.end, [(part, part.chosen.end) for part in parts if part.chosen.end is not None], shape)
    offset = _united(base.offset, [(part, part.chosen.offset) for part in parts if part.chosen.offset is not None], shape)
    windows = base.windows and not any(part.chosen.mortal for part in parts)
    blocks = _join_blocks(static, sequences, parts)
    return replace(base, end=end, offset=offset, blocks=blocks, passing=True, windows=windows)


@overload
def _united(base: Tensor, chosen: Sequence[tuple[Part, Tensor]], shape: tuple[int, int, int]) -> Tensor: ...


@overload
def _united(base: Tensor | None, chosen: Sequence[tuple[Part, Tensor]], shape: tuple[int, int, int]) -> Tensor | None: ...


def _united(base: Tensor | None, chosen: Sequence[tuple[Part, Tensor]], shape: tuple[int, int, int]) -> Tensor | None:
    """The vector of a layout, [Z | 1, H, n] or None, with what was chosen in it."""
    if len(chosen) == 1 and chosen[0][0].is_for_all(chosen[0][1], shape):
        values = chosen[0][1]
        return values.contiguous() if base is None else torch.maximum(base, values)
    if base is not None:
        united = base.expand(shape).clone()
    elif chosen:
        united = torch.zeros(shape, dtype=chosen[0][1].dtype, device=chosen[0][1].device)
    else:
        return None
    for part, values in chosen:
        part.put(united, values)
    return united


def _join_blocks(static: Static, sequences: int, parts: Sequence[Part]) -> Blocks | None:
    """Blocks of every sequence and head, of the finest sides in use, every causal block once, ascending."""
    base = static.layout
    listing = [part for part in parts if part.chosen.table is not None]
    if not listing:
        return _for_each(base.blocks, sequences)
    size = gcd(*(part.chosen.block for part in listing), base.blocks.rows if base.blocks else 0)
    keys = gcd(*(part.chosen.keys for part in listing), base.blocks.keys if base.blocks else 0)
    count, width = -(-base.length // size), -(-base.length // keys)
    # Rows of blocks before the first query are left open. A sequence for which no blocks were chosen may have the first one.
    first = min(_first_row(part) for part in parts) // size
    if len(listing) == 1 and static.table is None and listing[0].is_for_all(listing[0].chosen.table, (sequences, base.heads)):
        assert listing[0].chosen.table is not None
        return _listed(listing[0].chosen.table, size, keys, first)
    shape = (sequences, base.heads, count - first, width)
    union = partial(_union, static, listing, shape, (size, keys), first)
    return _listed(TableInParts(shape, min(_at_once(part, shape, size) for part in listing), union), size, keys, first)


def _first_row(part: Part) -> int:
    """The first row that a part speaks of: that of its first query, or of the block that the query lies in."""
    return part.first_row if part.chosen.table is None else part.first_row // part.chosen.block * part.chosen.block


def _for_each(blocks: Blocks | None, sequences: int) -> Blocks | None:
    """Static blocks beside choices of each sequence: kernels count all vectors of a layout by sequence."""
    return blocks and replace(
        blocks, count=blocks.count.expand(sequences, -1, -1), index=blocks.index.expand(sequences, -1, -1, -1)
    )


def _at_once(part: Part, shape: tuple[int, int, int, int], size: int) -> int:
    """Rows of blocks of `size` queries that are joined at once: all, unless a part is chosen some rows at a time."""
    table = part.chosen.table
    if not isinstance(table, TableInParts):
        return shape[2]
    return max(1, min(table.at_once * (part.chosen.block // size), FLAGS_AT_ONCE // (shape[0] * shape[1] * shape[3])))


def _union(
    static: Static,
    listing: Sequence[Part],
    shape: tuple[int, int, int, int],
    sides: tuple[int, int],
    first: int,
    rows: slice,
) -> Tensor:
    """Rows of a table [Z, H, rows of blocks, key blocks] of blocks of these sides, of which row 0 is row `first` of all."""
    table = torch.zeros(*shape[:2], rows.stop - rows.start, shape[3], dtype=torch.bool, device=static.layout.device)
    start = first + rows.start
    if static.table is not None and static.layout.blocks is not None:
        blocks = static.layout.blocks
        at, fixed = _finer_rows(static.table, (blocks.rows // sides[0], blocks.keys // sides[1]), start, table.shape[2])
        if fixed is not None:
            table[:, :, at : at + fixed.shape[2]] |= fixed[..., : shape[3]]
    for part in listing:
        chosen = part.chosen
        assert chosen.table is not None
        ratios, begins = (chosen.block // sides[0], chosen.keys // sides[1]), part.first_row // chosen.block
        at, values = _finer_rows(chosen.table, ratios, start - begins * ratios[0], table.shape[2])
        if values is not None:
            part.put(table[:, :, at:], values)
    return table


def _finer_rows(table: Tensor | TableInParts, ratios: tuple[int, int], start: int, count: int) -> tuple[int, Tensor | None]:
    """The rows of a table made finer by `ratios` that are among `count` rows from `start` on, and where among those they begin."""
    low, high = (min(max(0, row), table.shape[2]) for row in (start // ratios[0], -(-(start + count) // ratios[0])))
    if low == high:
        return 0, None
    own = table.choose(slice(low, high)) if isinstance(table, TableInParts) else table[:, :, low:high]
    at = low * ratios[0] - start
    return max(at, 0), _finer(own, *ratios)[:, :, max(-at, 0) : count - at]


def _finer(table: Tensor, rows: int, keys: int) -> Tensor:
    table = table if rows == 1 else table.repeat_interleave(rows, -2)
    return table if keys == 1 else table.repeat_interleave(keys, -1)


def _listed(table: Tensor | TableInParts, rows: int, keys: int, first: int) -> Blocks:
    """Lists of what causal rows keep; row 0 of the table is row `first` of blocks."""
    if isinstance(table, TableInParts) and table.at_once < table.shape[2]:
        count, index = _lists_in_parts(table, rows, keys, first)
    else:
        count, index = _lists_of(table.whole() if isinstance(table, TableInParts) else table, rows, keys, first)
    if first:
        count, index = F.pad(count, (first, 0)), F.pad(index, (0, 0, first, 0), value=-1)
    return Blocks(rows, keys, count, index)


def _lists_in_parts(table: TableInParts, rows: int, keys: int, first: int) -> tuple[Tensor, Tensor]:
    """`_lists_of` a whole table, with the room of the longest list. The lists are the largest of all that a choice takes: beside
    them lie those of one part at a time, and where an earlier part has a longer one those that are made wider."""
    count = index = None
    for start, part in table.parts():
        own_count, own = _lists_of(part, rows, keys, first + start)
        count = own_count.new_empty(table.shape[:3]) if count is None else count
        index = _widened(own.new_empty(*table.shape[:3], 0) if index is None else index, own.shape[3])
        count[:, :, start : start + part.shape[2]] = own_count
        index[:, :, start : start + part.shape[2], : own.shape[3]] = own
    assert count is not None
    assert index is not None
    return count, index


def _widened(index: Tensor, room: int) -> Tensor:
    """Lists with room for at least so many entries. Raises UserError where memory has none."""
    if room <= index.shape[3]:
        return index
    try:
        return F.pad(index, (0, room - index.shape[3]), value=-1)
    except torch.OutOfMemoryError as error:
        sequences, heads, blocks = index.shape[:3]
        size = 4 * index[..., :1].numel() * room / 1e9
        raise UserError(
            f"{sequences * heads} sequences and heads keep up to {room} single keys for each of {blocks} blocks of queries, and "
            f'{size:.1f} GB for their lists are not there: keep less mass, use longer blocks, share="kv" or probed_blocks'
        ) from error


def _lists_of(table: Tensor, rows: int, keys: int, first: int) -> tuple[Tensor, Tensor]:
    if fused.serves(table):
        from attnsieve.selection.fused.lists import listed

        return listed(table, rows, keys, first)
    return _lists(table, rows, keys, first)


def _lists(table: Tensor, rows: int, keys: int, first: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(table.shape[-1], dtype=torch.int32, device=table.device)
    stop = torch.arange(first + 1, first + 1 + table.shape[-2], device=table.device)[:, None] * rows
    table = table & (number * keys < stop)
    count = table.sum(-1, dtype=torch.int32)
    # Lists of single keys are read back for their length: room for the longest possible would be most of the memory.
    room = table.shape[-1] if rows == keys else max(1, int(count.max()))
    index = torch.full((*table.shape[:-1], room + 1), -1, dtype=torch.int32, device=table.device)
    place = torch.where(table, table.cumsum(-1) - 1, room)
    return count, index.scatter_(-1, place, number.expand_as(place))[..., :room].contiguous()
