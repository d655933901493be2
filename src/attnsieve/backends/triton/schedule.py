"""Schedules: which key tiles and which single keys each query tile reads, so that every kept pair is served exactly once.

A pair kept by offset bits, blocks or the corner is served by a key tile. A pair kept by `end` is served by a key tile too,
unless its key stands in the query tile's list of single keys. Two ways of listing, chosen per layout:

- columns: isolated keys that no row drops are flagged and listed once for all query tiles. Near the diagonal, from the `cut` of
  a query tile on, its key tiles are visited without a gap and serve flagged keys as well.
- all: where keys die scattered (DMA), every key that `end` keeps is listed per query tile.

Blocks narrower than long (single keys for a block of queries) are lists already: key tiles serve what `end` and the offsets
keep, and the keys of a row of blocks, in order, are the list of each of its query tiles.

Everything is built on the device. For layouts that serve many calls, what is best and how long the lists are is read back: twice
when a layout is first used at a tile shape, never again. Layouts that serve one call and whose ends the host knows to be windows and
columns are not read: lists get room for the most that there can be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnsieve.backends.triton.common import LISTED_ALL, LISTED_BLOCKS, LISTED_FLAGGED, LISTED_NOTHING, Lists, Marks, Mask
from attnsieve.backends.triton.key_lists import SPARE, key_lists, room_of
from attnsieve.backends.triton.lists import Summary, count_tiles, fill_tiles
from attnsieve.backends.triton.single_keys import block_lists
from attnsieve.backends.triton.survey import BY_LIST, BY_TILE, FLAGGED, SLACK, WINDOW, Survey, survey
from attnsieve.backends.triton.vectors import (
    Before,
    bits_of_blocks,
    count_offsets,
    flags_of,
    list_flagged,
    words_of_distances,
)
from attnsieve.launching import launch
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

# Listing every key must halve the keys read to pay for its lists, which hold a row's keys for every query tile.
_LISTING_GAIN = 2
_LISTING_SHARE = 0.25
# Keys that a word of `Marks` tells of, and the most words that are made: 1 GB.
_WORD = 64
_MOST_WORDS = 2**27


@dataclass(frozen=True)
class Schedule:
    """What the kernels read for query tiles of `positions` and key tiles of `keys` tokens.

    tiles: key tiles of each query tile, or None where key lists serve everything. singles: keys of each query tile, or None.
    marks: which rows keep the listed keys, where every key that `end` keeps is listed, or None.
    listed: one of the LISTED constants; most: the most keys in a list. block: side of the layout's whole blocks (1 without).
    summary: what tells tiles apart, or None where there are none.
    """

    positions: int
    keys: int
    mask: Mask
    tiles: Lists | None
    singles: Lists | None
    marks: Marks | None
    listed: int
    most: int
    block: int
    summary: Summary | None


@dataclass(frozen=True)
class _Choice:
    """How keys are listed, the most keys in a list, and whether all ends are columns or one window per head."""

    listed: int
    most: int
    windows: bool


def schedule(layout: Layout, positions: int, keys: int, *, listing: bool = True) -> Schedule:
    """The cached schedule of a layout. `listing=False`: key tiles serve every pair."""
    return layout.schedule(("triton", positions, keys, listing), lambda: _build(layout, positions, keys, listing))


def only_lists(layout: Layout) -> bool:
    """Whether lists of single keys serve every pair (unless `listing=False`), which no longer depends on tile shapes."""
    return layout.most_keys is not None and not beyond_end(layout)


def longest_row(end: Tensor) -> Tensor:
    """The most keys j <= i < end[j] of any row i."""
    n = end.shape[-1]
    position = torch.arange(n, device=end.device)
    change = torch.zeros(*end.shape[:-1], n + 1, dtype=torch.int64, device=end.device)
    change[..., :n] += end > position
    change.scatter_add_(-1, end.clamp_max(n).long(), -(end > position).long())
    return change.cumsum(-1).max()


def tiles_by_key(layout: Layout, built: Schedule) -> Lists:
    """The reverse of `built.tiles`: for each key tile the query tiles that visit it."""
    key = ("triton by key", built.positions, built.keys, built.listed)
    return layout.schedule(key, lambda: _tile_lists(layout, built, _count_tiles(layout, built, by_key=True), by_key=True))


def stretches(layout: Layout, built: Schedule, positions: int) -> tuple[Lists, int]:
    """The listed keys of stretches of `positions` rows, a multiple of the query tile's, and the most keys of one."""
    key = ("triton stretches", built.positions, built.keys, built.listed, positions)
    return layout.schedule(key, lambda: _stretches(layout, built, positions))


def _build(layout: Layout, positions: int, keys: int, listing: bool) -> Schedule:
    if layout.blocks is not None and layout.blocks.keys < layout.blocks.rows:
        rest = _build(replace(layout, blocks=None), positions, keys, listing=False)
        singles = block_lists(layout, layout.blocks, positions, SPARE)
        return replace(rest, singles=singles, listed=LISTED_BLOCKS.value)
    choice, found = _choose(layout, positions, keys, listing)
    block = 1 if layout.blocks is None else layout.blocks.rows
    by_bits = choice.windows and (block == 1 or block % keys == 0)
    mask = _mask(layout, choice, found, positions, by_bits)
    built = Schedule(positions, keys, mask, None, None, None, choice.listed, choice.most, block, None)
    if choice.listed == LISTED_ALL.value:
        marks = _marks(layout, built)
        built = replace(built, singles=_key_lists(layout, built, positions, marks, drop=True), marks=marks)
        found = survey(layout, positions, keys, choice.listed) if beyond_end(layout) else None
    return built if found is None else _with_tiles(layout, built, found)


def _choose(layout: Layout, positions: int, keys: int, listing: bool) -> tuple[_Choice, Survey | None]:
    """How to list keys, and what was found on the way."""
    if listing and layout.most_keys is not None:
        return _Choice(LISTED_ALL.value, layout.most_keys, False), None
    found = survey(layout, positions, keys, LISTED_FLAGGED.value if listing else LISTED_NOTHING.value)
    if layout.most_keys is not None:
        return _Choice(LISTED_NOTHING.value, 0, False), found
    if layout.passing and layout.windows:
        return _Choice(LISTED_FLAGGED.value if listing else LISTED_NOTHING.value, layout.length, True), found
    return _choose_by(found, layout, listing), found


def _choose_by(found: Survey, layout: Layout, listing: bool) -> _Choice:
    """Reads the device."""
    numbers = found.found.cpu()
    windows = bool((layout.length - numbers[SLACK].amax(-1) >= numbers[WINDOW].amax(-1)).all())
    if not listing:
        return _Choice(LISTED_NOTHING.value, 0, windows)
    if int(numbers[BY_LIST].sum()) * _LISTING_GAIN < int(numbers[BY_TILE].sum()):
        row = int(longest_row(layout.end))
        if row <= _LISTING_SHARE * layout.length:
            return _Choice(LISTED_ALL.value, row, False)
    flagged = int(numbers[FLAGGED].sum(-1).max())
    return _Choice(LISTED_FLAGGED.value if flagged else LISTED_NOTHING.value, flagged, windows)


def beyond_end(layout: Layout) -> bool:
    """Whether rows keep keys by other than `end`."""
    return layout.offset is not None or layout.blocks is not None or layout.corner is not None


def _mask(layout: Layout, choice: _Choice, found: Survey | None, positions: int, by_bits: bool) -> Mask:
    flagged = found.flagged if found is not None and choice.listed == LISTED_FLAGGED.value else None
    columns = found.columns if found is not None and by_bits else None
    ends, tiles = layout.end.contiguous(), -(-layout.length // positions)
    if flagged is not None and columns is None:
        ends = torch.where(flags_of(flagged, layout.length), ~ends, ends)
    words = words_of_distances(layout, found, by_bits) if by_bits or layout.offset is not None else None
    bits = None if layout.blocks is None else bits_of_blocks(layout.blocks)
    corner = None if layout.corner is None else layout.corner.contiguous()
    needs_cut = choice.listed == LISTED_FLAGGED.value or (choice.listed == LISTED_ALL.value and beyond_end(layout))
    return Mask(
        ends,
        words,
        corner,
        layout.corner_rows,
        bits,
        cut=ends.new_empty(*ends.shape[:2], tiles) if needs_cut else None,
        columns=columns,
        listed=None if columns is None else flagged,
        n=layout.length,
        n_words=1 if words is None else words.shape[-1],
        column_words=1 if columns is None else columns.shape[-1],
        corner_side=1 if corner is None else corner.shape[1],
        corner_bytes=1 if corner is None else corner.shape[2],
        n_blocks=1 if bits is None else bits.shape[-2],
        block_words=1 if bits is None else bits.shape[-1],
        tiles=tiles,
    )


def _with_tiles(layout: Layout, built: Schedule, found: Survey) -> Schedule:
    """Adds lists of key tiles and, where keys are flagged, those of flagged keys: one ascending list per head, of which a query
    tile reads the part below its cut."""
    distances = count_offsets(found, layout.length, built.positions, built.keys)
    built = replace(built, summary=Summary(found.latest, found.earliest, found.listed, distances))
    if built.listed != LISTED_FLAGGED.value:
        return replace(built, tiles=_tile_lists(layout, built, _count_tiles(layout, built), by_key=False))
    assert found.flagged is not None
    items, flagged = list_flagged(
        found.flagged, found.found[FLAGGED], layout.length, built.positions, built.keys, built.most, SPARE
    )
    whole, start = torch.empty_like(built.mask.cut), torch.empty_like(built.mask.cut, dtype=torch.int64)
    singles = Lists(start, whole, torch.empty_like(whole), items)
    count = _count_tiles(layout, built, flagged=flagged, singles=singles)
    return replace(built, singles=singles, tiles=_tile_lists(layout, built, count, by_key=False))


def _count_tiles(
    layout: Layout, built: Schedule, by_key: bool = False, flagged: Before | None = None, singles: Lists | None = None
) -> Tensor:
    """int32 [Z, H, tiles]: visited tiles. By query tile also fills in the cut and whose `singles` they read."""
    outer = -(-layout.length // built.keys) if by_key else built.mask.tiles
    count = layout.end.new_empty(layout.sequences, layout.heads, outer)
    room = 0 if singles is None else singles.items.shape[-1]
    grid, rest = _tile_kernel(layout, built, outer, by_key)
    launch(count_tiles, grid, built.mask, built.summary, count, flagged, singles, room, **rest)
    return count


def _tile_lists(layout: Layout, built: Schedule, count: Tensor, by_key: bool) -> Lists:
    entries = count + 1
    stop = entries.flatten().cumsum(0)
    start = stop.view(count.shape) - entries
    chosen = layout.passing or layout.most_keys is not None
    room = _most_tiles(layout, built) + count.numel() if chosen else int(stop[-1])
    lists = Lists(start, torch.empty_like(count), count, count.new_empty(room + SPARE))
    grid, rest = _tile_kernel(layout, built, count.shape[-1], by_key)
    launch(fill_tiles, grid, built.mask, built.summary, lists, **rest)
    return lists


def _most_tiles(layout: Layout, built: Schedule) -> int:
    """No fewer than the causal pairs of a query tile and a key tile, of all heads."""
    tiles = int(built.mask.tiles)
    return layout.sequences * layout.heads * (tiles * (tiles + 1) * built.positions // (2 * built.keys) + tiles)


def _tile_kernel(layout: Layout, built: Schedule, outer: int, by_key: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and options of the kernels that look at pairs of tiles."""
    listed = LISTED_NOTHING.value if built.mask.cut is None else built.listed
    sizes = {"H": layout.heads, "M": built.positions, "N": built.keys, "BLOCK": built.block, "LISTED": listed}
    return (outer, layout.sequences * layout.heads), {**sizes, "BY_KEY": by_key, "STEP": 256, "num_warps": 1}


def _key_lists(layout: Layout, built: Schedule, positions: int, marks: Marks | None, *, drop: bool) -> Lists:
    return key_lists(layout, built.mask, built.most, positions, built.keys, marks, drop=drop)


def _marks(layout: Layout, built: Schedule) -> Marks | None:
    """Room for words; None where one word is not enough or all together are too many: kernels then compute the rule."""
    lists = layout.sequences * layout.heads * built.mask.tiles
    chunks = -(-room_of(layout, built.most, built.positions) // built.keys)
    if built.keys > _WORD or lists * chunks * built.positions > _MOST_WORDS:
        return None
    return Marks(layout.end.new_empty(lists, chunks, built.positions, dtype=torch.int64), chunks)


def _stretches(layout: Layout, built: Schedule, positions: int) -> tuple[Lists, int]:
    if built.listed == LISTED_ALL.value:
        return _key_lists(layout, built, positions, None, drop=False), room_of(layout, built.most, positions)
    assert built.singles is not None
    columns, ratio = built.singles.items, positions // built.positions
    missing = -built.mask.tiles % ratio
    count = torch.nn.functional.pad(built.singles.count, (0, missing)).unflatten(-1, (-1, ratio)).amax(-1).contiguous()
    # A key is whole where the cut of every query tile leaves it to the list and the first row is not before it.
    cut = torch.nn.functional.pad(built.mask.cut, (0, missing), value=FOREVER).unflatten(-1, (-1, ratio))
    first = torch.arange(count.shape[-1], dtype=torch.int32, device=layout.device) * positions
    whole = torch.searchsorted(columns, torch.minimum(cut.amin(-1), first + 1), out_int32=True)
    start = torch.arange(0, columns.numel(), columns.shape[-1], device=layout.device).repeat_interleave(count.shape[-1])
    return Lists(start, whole, count, columns), built.most
