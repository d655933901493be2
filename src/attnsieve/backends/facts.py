"""What a layout keeps as a whole, where it is simple enough for kernels that know only causality, windows and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.layout import Layout


@dataclass(frozen=True)
class Facts:
    """dense: every causal pair is kept. window: every head keeps exactly the `window` newest keys, or None.
    only_blocks: nothing but listed blocks is kept."""

    dense: bool = False
    window: int | None = None
    only_blocks: bool = False


def facts(layout: Layout) -> Facts:
    """The facts of a layout. Read from the device once; none of layouts that serve one call, and of lists of single keys."""
    if layout.passing or layout.most_keys is not None or layout.corner is not None:
        return Facts()
    return layout.schedule("facts", lambda: _read(layout))


def _read(layout: Layout) -> Facts:
    width, uniform, silent = torch.stack(_measure(layout)).tolist()
    if uniform and width >= layout.length:
        return Facts(dense=True)
    if uniform and width > 0 and layout.offset is None and layout.blocks is None:
        return Facts(window=int(width))
    return Facts(only_blocks=bool(silent) and layout.blocks is not None and layout.offset is None)


def _measure(layout: Layout) -> list[Tensor]:
    """The window that the first key suggests, whether all keys of all heads agree, and whether `end` keeps nothing."""
    position = torch.arange(layout.length, device=layout.device)
    end = layout.end.clamp_max(layout.length)
    width = end[0, 0, 0].long()
    uniform = (end == (position + width).clamp_max(layout.length)).all()
    return [width, uniform.long(), (end <= position).all().long()]
