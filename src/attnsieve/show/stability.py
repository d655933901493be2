"""How far masks of single documents carry: a table and two grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnsieve.profiling import Stability
from attnsieve.show.canvas import new_figure
from attnsieve.show.grids import draw_share, grid_size
from attnsieve.show.tables import markdown, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of every other document's attention, what a head's mask keeps where it is called fixed.
FLOOR = 0.9


def stability_text(found: Stability) -> str:
    """What it says in a few lines, then one line per layer with the heads that a fixed mask cannot serve."""
    fixed = found.fixed(FLOOR)
    head = [
        f"stability of masks from {len(found.names)} documents, each by itself, tried on one another at {found.length} tokens: "
        + ", ".join(found.names),
        f"a fixed mask can serve {int(fixed.sum())} of {fixed.numel()} heads: each document's mask keeps at least "
        f"{percent(FLOOR)} % of every other's attention and leaves out half of the pairs",
    ]
    header = [
        "layer",
        "density %",
        "overlap %",
        "kept of its own %",
        "of others, worst %",
        "fixed",
        "heads that must follow the text",
    ]
    rows = [
        [
            str(layer),
            percent(float(found.density[:, row].mean())),
            percent(float(found.mean_overlap()[row].mean())),
            percent(float(found.own()[row].mean())),
            percent(float(found.worst()[row].min())),
            f"{int(fixed[row].sum())}/{fixed.shape[1]}",
            " ".join(str(number) for number, good in enumerate(fixed[row].tolist()) if not good) or "-",
        ]
        for row, layer in enumerate(found.fingerprint.indices)
    ]
    return "\n".join(head) + "\n\n" + markdown(header, rows, left=[6])


def stability_summary(found: Stability) -> dict[str, Any]:
    """The same for programs: per layer and head."""
    return {
        "names": list(found.names),
        "length": found.length,
        "layers": list(found.fingerprint.indices),
        "floor": FLOOR,
        "overlap": found.mean_overlap().tolist(),
        "own": found.own().tolist(),
        "worst": found.worst().tolist(),
        "fixed": found.fixed(FLOOR).tolist(),
    }


def stability_figure(found: Stability) -> Figure:
    """Overlap of masks, and the mass that a document's mask keeps of another in the worst case, per layer and head."""
    from matplotlib.colors import Normalize

    layers = found.fingerprint.indices
    width, height = grid_size(len(layers), found.fingerprint.heads)
    figure = new_figure(2 * width, height)
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    left, right = figure.subplots(1, 2)
    draw_share(figure, left, found.mean_overlap(), "overlap of masks of two documents", Normalize(0, 1), ticks, layers)
    draw_share(figure, right, found.worst(), "mass kept of another document, worst", Normalize(0, 1), ticks, layers)
    return figure
