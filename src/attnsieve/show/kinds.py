"""Which kind of rule every head has, as a map of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnsieve.patterns import Captured, Pattern, dense
from attnsieve.patterns.dynamic import CallAtom, DynamicAtom
from attnsieve.plan import Plan
from attnsieve.show.canvas import COLOURS, new_figure
from attnsieve.show.grids import MOST_NUMBERS, grid_size, label_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In the order of the legend, with a letter that tells them apart without colour.
KINDS = {
    "sink and window": ("s", "#F0E442"),
    "DAM": ("D", COLOURS[4]),
    "other positions": ("p", COLOURS[3]),
    "chosen from the input": ("i", COLOURS[5]),
    "dense": ("d", COLOURS[0]),
}


def kind_of(rule: Pattern) -> str:
    """One of `KINDS`. Guard rails such as `last_queries` choose nothing and do not count."""
    if rule == dense():
        return "dense"
    if any(isinstance(atom, DynamicAtom) for atom in rule):
        return "chosen from the input"
    if any(isinstance(atom, Captured) for atom in rule):
        return "DAM"
    names = {atom.name for atom in rule if not isinstance(atom, CallAtom)}
    return "sink and window" if names and names <= {"sink", "window"} else "other positions"


def kind_map(plan: Plan) -> Figure:
    """Layers x query heads, coloured and lettered by the kind of their rule; the legend counts heads."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(KINDS)
    kinds = [[kind_of(rule) for rule in row] for row in plan.patterns]
    layers, heads = len(kinds), len(kinds[0])
    width, height = grid_size(layers, heads)
    figure = new_figure(width, height + 0.9)
    axes = figure.subplots()
    numbers = [[names.index(kind) for kind in row] for row in kinds]
    axes.imshow(
        numbers, cmap=ListedColormap([colour for _, colour in KINDS.values()]), vmin=0, vmax=len(names) - 1, aspect="auto"
    )
    label_grid(axes, plan.fingerprint.indices, heads, "kind of rule")
    # White lines between heads.
    axes.set_xticks([head + 0.5 for head in range(heads - 1)], minor=True)
    axes.set_yticks([layer + 0.5 for layer in range(layers - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if layers * heads <= MOST_NUMBERS:
        for layer, row in enumerate(kinds):
            for head, kind in enumerate(row):
                colour = "white" if kind == "dense" else "black"
                axes.text(head, layer, KINDS[kind][0], ha="center", va="center", fontsize=7, color=colour)
    flat = [kind for row in kinds for kind in row]
    marks = [
        Patch(color=colour, label=f"{letter}  {name}: {flat.count(name)} heads")
        for name, (letter, colour) in KINDS.items()
        if name in flat
    ]
    figure.legend(handles=marks, loc="outside lower left", fontsize=8, frameon=False, ncols=max(1, int(width // 2.3)))
    return figure
