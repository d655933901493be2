"""Late rows of a layout within a window, whose keys no longer depend on where the text began."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.layout.vectors import Layout


def settled_row(layout: Layout, window: int) -> int:
    """The first row from which every row keeps the same distances, of a static layout without blocks that was compiled within
    `window`: beyond the corner, and beyond sight of the last key that is kept for longer or shorter than those at the end."""

    def read() -> int:
        life = _life(layout)
        strange = (life != life[:, -1:]).any(0).nonzero()
        corner = 0 if layout.corner_rows is None else int(layout.corner_rows.max())
        return max(corner, int(strange[-1]) + window if len(strange) else 0)

    return layout.schedule("settled row", read)


def settled_layout(layout: Layout, length: int) -> Layout:
    """The rule of the rows from `settled_row` on, for up to `length` positions counted from anywhere."""

    def build() -> Layout:
        end = torch.arange(length, device=layout.device) + _life(layout)[:, -1:]
        offset = None if layout.offset is None else layout.offset[:, :, :length]
        return Layout(length, end.to(torch.int32)[None], offset, windows=True)

    return layout.schedule(("settled", length), build)


def _life(layout: Layout) -> Tensor:
    """int64 [H, n]: for how many rows, its own first, each key is kept by `end`."""
    return (layout.end[0].long() - torch.arange(layout.length, device=layout.device)).clamp_min(0)
