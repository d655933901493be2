"""Lists of all keys that `end` keeps, for query tiles of some length.

Most keys outlive many query tiles. So the keys of long tiles, *roots*, are listed first, and what a root keeps in all its rows is
copied into the list of each of its tiles; only the root's other keys are looked at one by one. The roots of long layouts in turn
look at keys that outlive the root in which they lie, which most of the keys of a text that nobody selects do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.backends.triton.common import Lists, Marks, Mask
from attnsieve.backends.triton.single_keys import KeyLists, count_lasting, list_keys, list_lasting
from attnsieve.launching import launch
from attnsieve.layout import Layout

# Rows of a root, and the layouts, in rows, where keys that outlive theirs are listed before.
ROOT = 1024
LONG = 8192
# Kernels read the next entries of a list before they know that there are any.
SPARE = 4 * 64
# Lists begin at multiples of this, so that they are copied several keys at a time.
_ALIGNED = 16


def key_lists(layout: Layout, mask: Mask, most: int, positions: int, keys: int, marks: Marks | None, *, drop: bool) -> Lists:
    """Those of query tiles of `positions` rows. most: the most keys that a row keeps; keys: those of a key tile; see `list_keys`."""
    root = _root(layout, mask, most, keys) if positions <= ROOT < layout.length else None
    if root is not None and positions == ROOT:
        assert (marks, drop) == (None, False), "query tiles are shorter than roots"
        return Lists(*root[:4])
    return Lists(*_list_keys(layout, mask, most, positions, keys, root, marks, drop)[:4])


def _root(layout: Layout, mask: Mask, most: int, keys: int) -> KeyLists:
    """Lists of the layout's roots, made once."""
    make = lambda: _list_keys(layout, mask, most, ROOT, keys, _lasting(layout, mask), None, False)  # noqa: E731
    return layout.schedule("triton root", make)


def room_of(layout: Layout, most: int, positions: int) -> int:
    """The most keys that the rows of a query tile can keep by `end`."""
    return min(most + positions - 1, layout.length)


def _list_keys(
    layout: Layout,
    mask: Mask,
    most: int,
    positions: int,
    keys: int,
    parent: KeyLists | None,
    marks: Marks | None,
    drop: bool,
) -> KeyLists:
    """`list_keys` writes everything, so nothing is cleared or counted before."""
    room = -(-room_of(layout, most, positions) // _ALIGNED) * _ALIGNED
    heads, tiles = layout.sequences * layout.heads, -(-layout.length // positions)
    lists = _empty(layout, tiles, heads * tiles * room + SPARE, with_ends=positions == ROOT)
    step, warps = (256, 2) if parent is not None and positions < ROOT else (2048, 8)
    ratio = ROOT // positions
    sizes = (layout.heads, positions, keys, ratio, drop)
    launch(list_keys, (tiles, heads), mask, parent, lists, marks, room, *sizes, COPY=1024, STEP=step, num_warps=warps)
    return lists


def _lasting(layout: Layout, mask: Mask) -> KeyLists | None:
    """For each root the keys before it that are kept by its first row or later ones; their lists are the beginnings of one."""
    if layout.length <= LONG:
        return None
    heads, roots = layout.sequences * layout.heads, -(-layout.length // ROOT)
    lists = _empty(layout, roots, heads * layout.length, with_ends=True)
    launch(count_lasting, (roots, heads), mask, lists.whole, STEP=ROOT)
    launch(list_lasting, (roots, heads), mask, lists, STEP=ROOT)
    return lists


def _empty(layout: Layout, tiles: int, items: int, *, with_ends: bool) -> KeyLists:
    whole, count = layout.end.new_empty(2, layout.sequences, layout.heads, tiles).unbind()
    listed: Tensor = layout.end.new_empty(items)
    ends = torch.empty_like(listed) if with_ends else None
    return KeyLists(torch.empty_like(count, dtype=torch.int64), whole, count, listed, ends)
