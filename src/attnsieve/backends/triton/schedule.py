"""Schedules: which key tiles and which single keys each query tile reads, so that every kept pair is served exactly once.

A pair kept by offset bits, blocks or the corner is served by a key tile. A pair kept by `end` is served by a key tile too,
unless its key stands in the query tile's list of single keys. Two ways of listing, chosen per layout:

- columns: isolated keys that no row drops are flagged and listed once for all query tiles. Near the diagonal, from the `cut` of
  a query tile on, its key tiles are visited without a gap and serve flagged keys as well.
- all: where keys die scattered (DMA), every key that `end` keeps is listed per query tile.

Blocks narrower than long (single keys for a block of queries) are lists already: key tiles serve what `end` and the offsets
keep, and the keys of a row of blocks, in order, are the list of each of its query tiles.

Everything is built on the device. Sizes that the host cannot bound (`Layout.most_keys`) are read back: twice when a layout is
first used at a tile shape, never again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnsieve.backends.triton import lists as kernels
from attnsieve.backends.triton.common import LISTED_ALL, LISTED_BLOCKS, LISTED_FLAGGED, LISTED_NOTHING, Lists, Mask
from attnsieve.backends.triton.vectors import bits_of_blocks, words_of_keys, words_of_offsets
from attnsieve.layout import Blocks, Layout
from attnsieve.patterns import FOREVER

# A key tile holding this share of keys that no row drops is visited; below it they are listed.
_DENSE_SHARE = 0.75
# Listing every key must halve the keys read to pay for its lists, which hold a row's keys for every query tile.
_LISTING_GAIN = 2
_LISTING_SHARE = 0.25
_ROOT = 1024
# Kernels read the next entries of a list before they know that there are any.
_SPARE = 4 * 64


@dataclass(frozen=True)
class Schedule:
    """What the kernels read for query tiles of `positions` and key tiles of `keys` tokens.

    tiles: key tiles of each query tile, or None where key lists serve everything. singles: keys of each query tile, or None.
    listed: one of the LISTED constants. block: side of the layout's whole blocks (1 without).
    """

    positions: int
    keys: int
    mask: Mask
    tiles: Lists | None
    singles: Lists | None
    listed: int
    block: int


@dataclass(frozen=True)
class _Survey:
    """Read once from the device: whether to list all keys, the most keys of a row, the most flagged keys of a head."""

    list_all: bool
    most_keys: int
    most_flagged: int


def schedule(layout: Layout, positions: int, keys: int, *, listing: bool = True) -> Schedule:
    """The cached schedule of a layout. `listing=False`: key tiles serve every pair."""
    return layout.schedule(("triton", positions, keys, listing), lambda: _build(layout, positions, keys, listing))


def tiles_by_key(layout: Layout, built: Schedule) -> Lists:
    """The reverse of `built.tiles`: for each key tile the query tiles that visit it."""
    key = ("triton by key", built.positions, built.keys, built.listed)
    return layout.schedule(key, lambda: _tile_lists(layout, built, _summary(layout, built), by_key=True))


def stretches(layout: Layout, built: Schedule, positions: int) -> tuple[Lists, int]:
    """The listed keys of stretches of `positions` rows, a multiple of the query tile's, and the most keys of one."""
    key = ("triton stretches", built.positions, built.keys, built.listed, positions)
    return layout.schedule(key, lambda: _stretches(layout, built, positions))


def _build(layout: Layout, positions: int, keys: int, listing: bool) -> Schedule:
    if layout.blocks is not None and layout.blocks.keys < layout.blocks.rows:
        rest = _build(replace(layout, blocks=None, schedules={}), positions, keys, listing=False)
        return replace(rest, singles=_block_lists(layout, layout.blocks, positions), listed=LISTED_BLOCKS.value)
    survey = _survey(layout, positions, keys) if listing else _Survey(False, 0, 0)
    flags = None
    if survey.list_all:
        listed = LISTED_ALL.value
    elif survey.most_flagged:
        listed, flags = LISTED_FLAGGED.value, _flagged(layout, keys)
    else:
        listed = LISTED_NOTHING.value
    block = 1 if layout.blocks is None else layout.blocks.rows
    by_bits = not survey.list_all and (block == 1 or block % keys == 0)
    built = Schedule(positions, keys, _mask(layout, flags, positions, by_bits), None, None, listed, block)
    if listed != LISTED_ALL.value or _beyond_end(layout):
        summary = _summary(layout, built)
        built = _with_cut(layout, built, summary)
        built = replace(built, tiles=_tile_lists(layout, built, summary, by_key=False))
    if listed == LISTED_ALL.value:
        return replace(built, singles=_key_lists(layout, built, positions, survey.most_keys, sort=True, drop=True))
    return built if flags is None else replace(built, singles=_columns(built, flags, survey.most_flagged))


def _beyond_end(layout: Layout) -> bool:
    return layout.offset is not None or layout.blocks is not None or layout.corner is not None


def _survey(layout: Layout, positions: int, keys: int) -> _Survey:
    if layout.most_keys is not None:
        return _Survey(True, layout.most_keys, 0)
    return layout.schedule(("triton survey", positions, keys), lambda: _measure(layout, positions, keys))


def _measure(layout: Layout, positions: int, keys: int) -> _Survey:
    forever = layout.end == FOREVER
    mortal = torch.where(forever, 0, layout.end).clamp_max(layout.length)
    flagged = _flagged(layout, keys).sum(-1).max()
    by_list, by_tile = _keys_read(mortal, positions, 1), _keys_read(mortal, positions, keys)
    row, listed, tiled, columns = torch.stack([_longest_row(layout.end), by_list, by_tile, flagged]).tolist()
    short = row <= _LISTING_SHARE * layout.length
    return _Survey(short and listed * _LISTING_GAIN < tiled, row, columns)


def _keys_read(end: Tensor, positions: int, keys: int) -> Tensor:
    """Keys that all query tiles together read when keys come in groups of `keys`."""
    first = torch.arange(0, end.shape[-1], keys, device=end.device)
    last = _per_tile(end, keys).amax(-1)
    tiles = (last - 1) // positions - first // positions + 1
    return torch.where(last > first, tiles, 0).sum() * keys


def _longest_row(end: Tensor) -> Tensor:
    """The most keys j <= i < end[j] of any row i."""
    n = end.shape[-1]
    position = torch.arange(n, device=end.device)
    change = torch.zeros(*end.shape[:-1], n + 1, dtype=torch.int64, device=end.device)
    change[..., :n] += end > position
    change.scatter_add_(-1, end.clamp_max(n).long(), -(end > position).long())
    return change.cumsum(-1).max()


def _flagged(layout: Layout, keys: int) -> Tensor:
    """bool [Z, H, n]: keys that no row drops, where they are too few to fill their tile."""
    forever = layout.end == FOREVER
    dense = _per_tile(forever, keys).sum(-1) >= _DENSE_SHARE * keys
    return forever & ~dense.repeat_interleave(keys, dim=-1)[..., : layout.length]


def _per_tile(vector: Tensor, keys: int) -> Tensor:
    """[Z, H, B, keys], zero beyond the last key."""
    pad = -vector.shape[-1] % keys
    tiles: Tensor = torch.nn.functional.pad(vector, (0, pad)).unflatten(-1, (-1, keys))
    return tiles


def _mask(layout: Layout, flags: Tensor | None, positions: int, by_bits: bool) -> Mask:
    ends = layout.end.contiguous() if flags is None else torch.where(flags, ~layout.end, layout.end)
    distances = _distances(layout) if by_bits else None
    columns = None if distances is None else words_of_keys(layout.end == FOREVER)
    distances = layout.offset if distances is None else distances
    words = None if distances is None else words_of_offsets(distances)
    bits = None if layout.blocks is None else bits_of_blocks(layout.blocks)
    corner = None if layout.corner is None else layout.corner.contiguous()
    return Mask(
        ends,
        words,
        corner,
        layout.corner_rows,
        bits,
        cut=None,
        columns=columns,
        listed=None if columns is None or flags is None else words_of_keys(flags),
        n=layout.length,
        n_words=1 if words is None else words.shape[-1],
        column_words=1 if columns is None else columns.shape[-1],
        corner_side=1 if corner is None else corner.shape[1],
        corner_bytes=1 if corner is None else corner.shape[2],
        n_blocks=1 if bits is None else bits.shape[-2],
        block_words=1 if bits is None else bits.shape[-1],
        tiles=-(-layout.length // positions),
    )


def _distances(layout: Layout) -> Tensor | None:
    """bool [Z, H, n]: what each head keeps by distance, its window included; None where ends are not windows and columns.

    Reads the device once; never for masks chosen from the input.
    """
    return None if layout.most_keys is not None else layout.schedule("triton distances", lambda: _window_and_offsets(layout))


def _window_and_offsets(layout: Layout) -> Tensor | None:
    position = torch.arange(layout.length, dtype=torch.int32, device=layout.device)
    forever = layout.end == FOREVER
    window = torch.where(forever, 0, layout.end - position).amax(-1, keepdim=True).clamp_min(0)
    # A key that is never seen counts as one seen by a window of 0.
    limit = torch.where(window > 0, position + window, 0).clamp_max(layout.length)
    found = torch.where(layout.end > position, layout.end, 0).clamp_max(layout.length)
    if not bool((forever | (found == limit)).all()):
        return None
    kept = position < window
    return kept if layout.offset is None else kept | layout.offset


def _summary(layout: Layout, built: Schedule) -> kernels.Summary:
    end, position = built.mask.ends, torch.arange(layout.length, dtype=torch.int32, device=layout.device)
    listed = torch.full_like(end, built.listed == LISTED_ALL.value, dtype=torch.bool)
    if built.listed == LISTED_FLAGGED.value:
        listed = end < 0
        end = torch.where(listed, ~end, end)
    kept = torch.where(end > position, end, 0)
    latest, of_lists = (_per_tile(kept.masked_fill(away, 0), built.keys).amax(-1).contiguous() for away in (listed, ~listed))
    distances = None
    if layout.offset is not None:
        distances = torch.nn.functional.pad(layout.offset.cumsum(-1, dtype=torch.int32), (1, 0)).contiguous()
    return kernels.Summary(latest, _per_tile(end, built.keys).amin(-1).contiguous(), of_lists, distances)


def _with_cut(layout: Layout, built: Schedule, summary: kernels.Summary) -> Schedule:
    """Adds the cut where lists serve some keys."""
    if built.listed == LISTED_NOTHING.value:
        return built
    cut = torch.empty(layout.sequences, layout.heads, built.mask.tiles, dtype=torch.int32, device=layout.device)
    _count(layout, built, summary, torch.empty_like(cut), cut, by_key=False)
    return replace(built, mask=built.mask._replace(cut=cut))


def _count(layout: Layout, built: Schedule, summary: kernels.Summary, count: Tensor, cut: Tensor, by_key: bool) -> None:
    kernels.count_tiles[(count.shape[-1], layout.sequences * layout.heads)](
        built.mask, summary, count, cut, layout.heads, built.positions, built.keys, built.block, built.listed, by_key, STEP=256
    )


def _tile_lists(layout: Layout, built: Schedule, summary: kernels.Summary, by_key: bool) -> Lists:
    outer = -(-layout.length // built.keys) if by_key else built.mask.tiles
    count = torch.empty(layout.sequences, layout.heads, outer, dtype=torch.int32, device=layout.device)
    _count(layout, built, summary, count, torch.empty_like(count), by_key)
    stop = count.flatten().cumsum(0)
    start = stop - count.flatten()
    items = torch.zeros(int(stop[-1]) + _SPARE, dtype=torch.int32, device=layout.device)
    lists = Lists(start, torch.empty_like(count), count, items)
    kernels.fill_tiles[(outer, layout.sequences * layout.heads)](
        built.mask, summary, lists, layout.heads, built.positions, built.keys, built.block, built.listed, by_key, STEP=256
    )
    return lists


def _columns(built: Schedule, flags: Tensor, most: int) -> Lists:
    """One ascending list per head; a query tile reads the part below its cut."""
    place = torch.where(flags, flags.cumsum(-1) - 1, most)
    position = torch.arange(flags.shape[-1], dtype=torch.int32, device=flags.device)
    columns = torch.full((*flags.shape[:-1], most + _SPARE), FOREVER, dtype=torch.int32, device=flags.device)
    columns.scatter_(-1, place, position.expand_as(place))
    columns[..., most:] = FOREVER
    first = torch.arange(built.mask.tiles, dtype=torch.int32, device=flags.device) * built.positions
    whole = torch.searchsorted(columns, torch.minimum(built.mask.cut, first + 1), out_int32=True)
    count = torch.searchsorted(columns, torch.minimum(built.mask.cut, first + built.positions), out_int32=True)
    start = torch.arange(0, columns.numel(), columns.shape[-1], device=flags.device)
    return Lists(start.repeat_interleave(built.mask.tiles), whole, count, columns)


def _block_lists(layout: Layout, blocks: Blocks, positions: int) -> Lists:
    """The keys of every row of blocks, those that all its rows keep by nothing else first; query tiles must divide the rows."""
    step = torch.arange(blocks.keys, dtype=torch.int32, device=layout.device)
    keys = (blocks.index[..., None] * blocks.keys + step).flatten(-2)
    real = ((blocks.index >= 0)[..., None] & (step >= 0)).flatten(-2) & (keys < layout.length)
    keys = torch.where(real, keys, 0)
    first = torch.arange(keys.shape[2], dtype=torch.int32, device=layout.device)[:, None] * blocks.rows
    end = layout.end.expand(*keys.shape[:2], -1).gather(-1, keys.flatten(2).long()).view_as(keys)
    whole = real & (keys <= first) & (end <= first)
    if layout.offset is not None:
        whole = torch.zeros_like(whole)
    n_whole = whole.sum(-1, dtype=torch.int32)
    room = keys.shape[-1]
    place = torch.where(whole, whole.cumsum(-1), n_whole[..., None] + (real & ~whole).cumsum(-1)) - 1
    items = torch.zeros(*keys.shape[:-1], room + 1, dtype=torch.int32, device=layout.device)
    items.scatter_(-1, torch.where(real, place, room).long(), keys)
    tile = torch.arange(-(-layout.length // positions), device=layout.device) * positions // blocks.rows
    start = (torch.arange(n_whole.numel(), device=layout.device) * (room + 1)).view_as(n_whole)
    starts, whole_counts, counts = (x[..., tile].contiguous() for x in (start, n_whole, real.sum(-1, dtype=torch.int32)))
    return Lists(starts, whole_counts, counts, torch.nn.functional.pad(items.flatten(), (0, _SPARE)))


def _key_lists(layout: Layout, built: Schedule, positions: int, most: int, sort: bool, drop: bool) -> Lists:
    """Lists of all keys that `end` keeps, refined from those of longer tiles so that few keys are looked at twice."""
    parent = None
    if positions < _ROOT < layout.length:
        root = lambda: _key_lists(layout, built, _ROOT, most, sort=False, drop=False)  # noqa: E731
        parent = layout.schedule("triton root", root)
    tiles = -(-layout.length // positions)
    room = min(most + positions - 1, layout.length)
    rows = layout.sequences * layout.heads * tiles
    start = torch.arange(rows, device=layout.device) * room
    items = torch.empty(rows * room + _SPARE, dtype=torch.int32, device=layout.device)
    count = torch.empty(layout.sequences, layout.heads, tiles, dtype=torch.int32, device=layout.device)
    lists = Lists(start, torch.empty_like(count), count, items)
    kernels.list_keys[(tiles, layout.sequences * layout.heads)](
        built.mask, parent, lists, room, layout.heads, positions, _ROOT // positions, sort, drop, STEP=1024
    )
    return lists


def _stretches(layout: Layout, built: Schedule, positions: int) -> tuple[Lists, int]:
    survey = _survey(layout, built.positions, built.keys)
    if built.listed == LISTED_ALL.value:
        lists = _key_lists(layout, built, positions, survey.most_keys, sort=True, drop=False)
        return lists, min(survey.most_keys + positions - 1, layout.length)
    assert built.singles is not None
    columns, ratio = built.singles.items, positions // built.positions
    count = _per_tile(built.singles.count, ratio).amax(-1).contiguous()
    # A key is whole where the cut of every query tile leaves it to the list and the first row is not before it.
    cut = torch.nn.functional.pad(built.mask.cut, (0, -built.mask.tiles % ratio), value=FOREVER).unflatten(-1, (-1, ratio))
    first = torch.arange(count.shape[-1], dtype=torch.int32, device=layout.device) * positions
    whole = torch.searchsorted(columns, torch.minimum(cut.amin(-1), first + 1), out_int32=True)
    start = torch.arange(0, columns.numel(), columns.shape[-1], device=layout.device).repeat_interleave(count.shape[-1])
    return Lists(start, whole, count, columns), survey.most_flagged
