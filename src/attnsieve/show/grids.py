"""Layer x head grids of one number per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from attnsieve.errors import require
from attnsieve.show.canvas import new_figure, quiet_axes
from attnsieve.show.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# Up to this many heads every cell carries its number; beyond, the colours have to do.
MOST_NUMBERS = 700
LEAST_DENSITY = 0.005


def density_grid(density: Tensor, *, layers: Sequence[int] | None = None) -> Figure:
    """density: [layers, heads] in 0 .. 1, on a logarithmic colour scale. layers: their numbers in the model, by default from 0."""
    from matplotlib.colors import LogNorm

    title, norm = "density: share of causal pairs kept", LogNorm(LEAST_DENSITY, 1.0, clip=True)
    return share_grid(density, title, norm, ticks=(0.01, 0.03, 0.1, 0.3, 1.0), layers=layers)


def mass_grid(mass: Tensor, *, layers: Sequence[int] | None = None) -> Figure:
    """mass: [layers, heads] in 0 .. 1, on a linear colour scale. layers as in `density_grid`."""
    from matplotlib.colors import Normalize

    title = "retained mass: share of attention inside the mask"
    return share_grid(mass, title, Normalize(0.0, 1.0), ticks=(0.0, 0.25, 0.5, 0.75, 1.0), layers=layers)


def share_grid(share: Tensor, title: str, norm: Normalize, *, ticks: tuple[float, ...], layers: Sequence[int] | None) -> Figure:
    """share: [layers, heads] in 0 .. 1, printed in percent where there is room. Raises UserError for another shape."""
    require(share.ndim == 2 and share.numel() > 0, f"a grid is drawn from [layers, heads], got shape {tuple(share.shape)}")
    figure = new_figure(*grid_size(*share.shape))
    draw_share(figure, figure.subplots(), share, title, norm, ticks, layers or range(len(share)))
    return figure


def grid_size(layers: int, heads: int) -> tuple[float, float]:
    """Inches that a grid needs to be read."""
    cell_width, cell_height = (0.42, 0.24) if layers * heads <= MOST_NUMBERS else (0.2, 0.16)
    return max(4.2, cell_width * heads + 1.8), max(2.4, cell_height * layers + 1.1)


def draw_share(
    figure: Figure, axes: Axes, share: Tensor, title: str, norm: Normalize, ticks: tuple[float, ...], layers: Sequence[int]
) -> None:
    """One grid with its colour bar; `layers` are the numbers of its rows in the model."""
    image = axes.imshow(share.numpy(), cmap="cividis", norm=norm, aspect="auto")
    label_grid(axes, layers, share.shape[1], title)
    if share.numel() <= MOST_NUMBERS:
        _print_numbers(axes, share, norm)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=40, pad=0.02)
    bar.set_ticks(list(ticks), labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def label_grid(axes: Axes, layers: Sequence[int], heads: int, title: str) -> None:
    """Layers, by these numbers, downwards, query heads to the right."""
    quiet_axes(axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("query head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xticks(range(0, heads, 1 if heads <= 16 else 4))
    rows = range(0, len(layers), 1 if len(layers) <= 40 else 4)
    axes.set_yticks(rows, labels=[str(layers[row]) for row in rows])


def _print_numbers(axes: Axes, share: Tensor, norm: Normalize) -> None:
    for layer, row in enumerate(share.tolist()):
        for head, value in enumerate(row):
            colour = "white" if float(norm(value)) < 0.55 else "black"
            axes.text(head, layer, percent(value), ha="center", va="center", fontsize=7, color=colour)
