"""Heads side by side at every step of DAM: mean map, Box-Cox map, true mask, extended mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from attnsieve.dam import EPS, LAM, TAU, transform
from attnsieve.errors import require
from attnsieve.show.canvas import COLOURS, FUTURE, new_figure, quiet_axes
from attnsieve.show.views import HeadView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PANEL = 3.2
MOST_VIEWS = 12
# A panel has about this many pixels. Larger maps are averaged down to it, so that no line falls between two pixels.
PIXELS = 512
# Where the logarithmic scale of the mean map begins; a uniform row of 2048 keys lies a little above it.
LEAST_MEAN = 3e-4
# Mean width of a letter of a head's name in inches, with room to spare.
LETTER = 0.098


@dataclass(frozen=True)
class Panel:
    """One column of the figure: the map it takes from a view, its colours, and the label of its colour bar if it has one."""

    title: Callable[[HeadView], str]
    data: Callable[[HeadView], Tensor | None]
    style: dict[str, Any]
    bar: str | None = None
    ticks: tuple[float, ...] = ()


def head_figure(views: Sequence[HeadView], *, lam: float = LAM, eps: float = EPS, tau: float = TAU) -> Figure:
    """One row per head, one column per map that any view has. The colours of the Box-Cox map are centred at `tau`.

    Raises UserError for no views, more than `MOST_VIEWS`, or views without any map.
    """
    require(0 < len(views) <= MOST_VIEWS, f"a figure shows 1 to {MOST_VIEWS} heads, got {len(views)}: name others")
    figure = new_figure(1, 1)
    panels = [panel for panel in _panels(views, lam, eps, tau) if any(panel.data(view) is not None for view in views)]
    require(
        bool(panels),
        "there is nothing to draw of these heads: keys chosen from the input have no mask of their own; give a profile with maps",
    )
    bars = 0.045 if any(panel.bar for panel in panels) else 0.001
    figure.set_size_inches(max(4.5, (PANEL + 0.25) * len(panels) + 0.3), (PANEL + 0.6) * len(views) + 12 * bars)
    grid = figure.subplots(len(views) + 1, len(panels), squeeze=False, height_ratios=[1.0] * len(views) + [bars])
    for panel, column in zip(panels, grid.T, strict=True):
        _draw_column(figure, panel, views, list(column))
    for view, axes in zip(views, grid[:, 0], strict=False):
        axes.set_ylabel("query position", fontsize=9)
        # Into the empty line above the panel's title, over the width of the row.
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        name = _fitting(view.name, figure.get_figwidth())
        axes.annotate(name, (0, 1), (0, 19), **place, fontsize=10, weight="bold").set_in_layout(False)
    return figure


def _panels(views: Sequence[HeadView], lam: float, eps: float, tau: float) -> list[Panel]:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, PowerNorm, TwoSlopeNorm

    strongest = max((float(view.mean.max()) for view in views if view.mean is not None), default=1.0)
    top = max(float(transform(torch.tensor(strongest), lam, eps)), 1.1 * tau)
    ink = {"cmap": LinearSegmentedColormap.from_list("ink", ["white", COLOURS[0], "#00263d"]), "norm": PowerNorm(0.5, 0, 1)}
    return [
        Panel(
            lambda view: "mean attention",
            lambda view: view.mean,
            {"cmap": "viridis", "norm": LogNorm(LEAST_MEAN, 1.0, clip=True)},
            "mean probability, log scale",
            (0.001, 0.01, 0.1, 1.0),
        ),
        Panel(
            lambda view: f"Box-Cox map, λ = {lam:g}",
            lambda view: None if view.mean is None else transform(view.mean, lam, eps),
            {"cmap": "viridis", "norm": TwoSlopeNorm(tau, 0.0, top)},
            f"amplified attention, scale centred at τ = {tau:g}",
            (0.0, tau / 2, tau, (tau + top) / 2, top),
        ),
        Panel(_mask_title, lambda view: view.mask, ink),
        Panel(_extended_title, lambda view: view.extended, ink),
    ]


def _mask_title(view: HeadView) -> str:
    return f"{'true mask' if view.captured else 'mask'}, rows below {0 if view.mask is None else len(view.mask)}"


def _extended_title(view: HeadView) -> str:
    return f"{'extended mask' if view.captured else 'mask'}, {0 if view.extended is None else len(view.extended)} tokens"


def _fitting(name: str, inches: float) -> str:
    """The name of a head, cut where a line of bold letters would leave a figure of that width."""
    most = int((inches - 0.5) / LETTER)
    return name if len(name) <= most else name[: most - 1] + "…"


def _draw_column(figure: Figure, panel: Panel, views: Sequence[HeadView], column: list[Axes]) -> None:
    *cells, foot = column
    images = [_draw(axes, panel, view) for axes, view in zip(cells, views, strict=True)]
    cells[-1].set_xlabel("key position", fontsize=9)
    if panel.bar is None:
        foot.set_axis_off()
        return
    image = next(image for image in images if image is not None)
    bar = figure.colorbar(image, cax=foot, orientation="horizontal")
    bar.set_label(panel.bar, fontsize=8)
    bar.set_ticks(list(panel.ticks), labels=[f"{tick:.2g}" for tick in panel.ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=2.5)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _draw(axes: Axes, panel: Panel, view: HeadView) -> AxesImage | None:
    data = panel.data(view)
    quiet_axes(axes)
    axes.spines[:].set_visible(False)
    if data is None:
        axes.set_axis_off()
        return None
    size = len(data)
    axes.set_facecolor(FUTURE)
    axes.set_title(f"\n\n{panel.title(view)}", fontsize=9, loc="left")
    image = axes.imshow(_cells(data), extent=(0, size, size, 0), interpolation="antialiased", **panel.style)
    ticks = [0, size // 4, size // 2, 3 * size // 4, size]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    corner = 0 if view.mask is None else len(view.mask)
    if data is view.extended and 0 < corner < size:
        axes.plot([0, corner], [corner, corner], color=COLOURS[1], linewidth=1, linestyle=":")
    return image


def _cells(data: Tensor) -> np.ma.MaskedArray[Any, Any]:
    """A causal map as it is drawn, at most `PIXELS` to a side; cells wholly in the future are masked."""
    step = -(-len(data) // PIXELS)
    if step > 1:
        ones = torch.ones(len(data), len(data)).tril()
        total, causal = (avg_pool2d(part.float()[None], step, ceil_mode=True)[0] for part in (data, ones))
        data = total / causal.clamp_min(1e-9)
    values = data.float().numpy()
    return np.ma.array(values, mask=np.triu(np.ones(values.shape, dtype=bool), 1))  # type: ignore[no-untyped-call]
