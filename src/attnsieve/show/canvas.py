"""Figures without pyplot: made, styled and saved here, so that drawing leaves no global state behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnsieve.errors import UserError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours: told apart with any common colour blindness. Their yellow is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
FUTURE = "#e9e9e9"
GREY = "#606060"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that finds room for its labels by itself.

    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed; run: pip install 'attnsieve[viz]'") from None
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` in the format that the suffix names (.png, .svg, .pdf), making folders on the way.

    Raises UserError for another suffix.
    """
    target = Path(path)
    require(target.suffix in SUFFIXES, f"figures are saved as {', '.join(SUFFIXES)}, got {target.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def quiet_axes(axes: Axes) -> None:
    """Small ticks and no box: the data speaks."""
    axes.tick_params(labelsize=8, length=2.5, colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#b0b0b0")
