"""What a decode step reads of a layout, for the query heads of a KV group together: words with a bit per head, and lists.

Beyond its corner a static mask keeps a key by its position (columns) or by its distance (windows, offsets). So two words say which
heads of a group keep key j at position p: one by j, one by p - j. Keys that no head keeps are not looked at:

    near        the `reach` newest keys; up to there every distance is kept by some head
    columns     keys that no row of some head drops, a list
    distances   kept distances from `reach` on, a list

Masks that were chosen from the input, or whose ends are of another kind, have no words and no lists: all keys are near.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER

# Lists are counted at multiples of this many positions, and end with as many spare entries. Sizes are rounded up, so that kernels
# are not compiled again for each that is, or is not, a multiple of 16.
STEP = 128


class Rule(NamedTuple):
    """W words stand for all heads of the layout. What a layout lacks is None.

    Static: reach int32 [W]; by_distance int32 [W, far]; by_key int32 [W, n]; entries int32 [W, room], columns and from
    `room_columns` on distances; columns_below, distances_below int32 [W, steps]: how many are below each multiple of STEP.
    Else: end int32 [Z, H, n], offset bool [Z, H, n].
    Both: block_index int32 [Z, H, nb, K]; corner uint8 [H, L, bytes]; corner_rows int32 [H]; corner_stop int32 [W], the first row
    beyond the corners of all heads of a word.
    """

    n: Any
    reach: Any = None
    by_distance: Any = None
    far: Any = 1
    by_key: Any = None
    entries: Any = None
    room: Any = 1
    room_columns: Any = 1
    columns_below: Any = None
    distances_below: Any = None
    steps: Any = 1
    end: Any = None
    offset: Any = None
    block_index: Any = None
    n_blocks: Any = 1
    block_rows: Any = 1
    block_side: Any = 1
    block_keys: Any = 1
    corner: Any = None
    corner_side: Any = 1
    corner_bytes: Any = 1
    corner_rows: Any = None
    corner_stop: Any = None

    @property
    def listed(self) -> bool:
        """Whether loads decide which keys to load."""
        return any(part is not None for part in (self.entries, self.end, self.block_index))


def rule(layout: Layout, heads: int) -> Rule:
    """The cached rule of a layout, `heads` of its heads to a word.

    Of a static layout it is built, and its sizes read, on first use. Of masks chosen from the input the device is not read.
    """
    return layout.schedule(("triton decode", heads), lambda: _rule(layout, heads))


def _rule(layout: Layout, heads: int) -> Rule:
    chosen = layout.passing or layout.most_keys is not None or layout.sequences > 1
    found = None if chosen else _static(layout, heads)
    if found is None:
        offset = None if layout.offset is None else layout.offset.contiguous()
        found = Rule(layout.length, end=layout.end.contiguous(), offset=offset)
    blocks, corner, rows = layout.blocks, layout.corner, layout.corner_rows
    if blocks is not None:
        _, _, n_rows, n_blocks = blocks.index.shape
        found = found._replace(
            block_index=blocks.index.contiguous(),
            n_blocks=n_blocks,
            block_rows=n_rows,
            block_side=blocks.rows,
            block_keys=blocks.keys,
        )
    if corner is None or rows is None:
        return found
    stop = rows.view(-1, heads).amax(-1)
    side, width = corner.shape[1:]
    return found._replace(corner=corner.contiguous(), corner_side=side, corner_bytes=width, corner_rows=rows, corner_stop=stop)


def _static(layout: Layout, heads: int) -> Rule | None:
    """Words and lists; None where ends are not windows and columns."""
    columns, distances, ordinary = _columns_and_distances(layout)
    by_key, by_distance = _words(columns, heads), _words(distances, heads)
    position = torch.arange(layout.length, dtype=torch.int32, device=layout.device)
    reach = torch.where(by_distance != 0, layout.length, position).amin(-1)
    far_columns = (by_key != 0) & (reach < layout.length)[:, None]
    far_distances = (by_distance != 0) & (position >= reach[:, None])
    far = torch.where(by_distance != 0, position + 1, 1).amax()
    sizes = [ordinary, far, (by_key != 0).any(), *(flags.sum(-1).amax() for flags in (far_columns, far_distances))]
    is_ordinary, far, any_column, *most = torch.stack([size.long() for size in sizes]).tolist()
    if not is_ordinary:
        return None
    by_distance = by_distance[:, : _rounded(far, 16)].contiguous()
    found = Rule(layout.length, reach.to(torch.int32), by_distance, by_distance.shape[-1])
    if any_column:
        found = found._replace(by_key=by_key)
    if not any(most):
        return found
    lists = [_listed(flags, size) for flags, size in zip((far_columns, far_distances), most, strict=True)]
    below = [_below(flags) for flags in (far_columns, far_distances)]
    return found._replace(
        entries=torch.cat(lists, dim=-1),
        room=sum(part.shape[-1] for part in lists),
        room_columns=lists[0].shape[-1],
        columns_below=below[0],
        distances_below=below[1],
        steps=below[0].shape[-1],
    )


def _columns_and_distances(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """bool [H, n] each: keys that no row drops, and distances kept; whether that is all of the layout's ends and offsets.

    A head that keeps everything keeps every distance and has no columns: its keys are then read one after the other.
    """
    end, n = layout.end[0], layout.length
    position = torch.arange(n, dtype=torch.int32, device=layout.device)
    forever = end == FOREVER
    window = torch.where(forever, 0, end - position).amax(-1, keepdim=True).clamp(0, n)
    # A key that is never seen counts as one seen by a window of 0.
    limit = torch.where(window > 0, position + window, 0).clamp_max(n)
    found = torch.where(end > position, end, 0).clamp_max(n)
    every = forever.all(-1, keepdim=True)
    distances = (position < window) | every
    if layout.offset is not None:
        distances = distances | layout.offset[0]
    return forever & ~every, distances, (forever | (found == limit)).all()


def _words(flags: Tensor, heads: int) -> Tensor:
    """int32 [H / heads, n] of bool [H, n]: bit r for head r of a word's heads."""
    bit = torch.ones((), dtype=torch.int32, device=flags.device) << torch.arange(heads, device=flags.device)
    parts: Tensor = flags.unflatten(0, (-1, heads)) * bit.to(torch.int32)[:, None]
    return parts.sum(1, dtype=torch.int32)


def _listed(flags: Tensor, most: int) -> Tensor:
    """int32 [W, room]: positions of the flags, ascending, then FOREVER, STEP times at least."""
    place = torch.where(flags, flags.cumsum(-1) - 1, most)
    position = torch.arange(flags.shape[-1], dtype=torch.int32, device=flags.device)
    listed = torch.full((len(flags), _rounded(most, STEP) + STEP), FOREVER, dtype=torch.int32, device=flags.device)
    listed.scatter_(-1, place, position.expand_as(place))
    listed[:, most] = FOREVER
    return listed


def _below(flags: Tensor) -> Tensor:
    """int32 [W, steps]: how many flags are set below 0, STEP, 2 STEP ..., at least up to the first multiple from n on."""
    steps = _rounded(flags.shape[-1], 16 * STEP) // STEP + 16
    counts = torch.nn.functional.pad(flags, (0, (steps - 1) * STEP - flags.shape[-1])).unflatten(-1, (-1, STEP)).sum(-1)
    return torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).to(torch.int32)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
