"""Retained mass by length: what measured candidates, and a plan made of them, keep as texts grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement
from attnsieve.show.canvas import COLOURS, GREY, MARKERS, new_figure, quiet_axes
from attnsieve.show.tables import markdown, percent, shortened, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8


def length_figure(measurement: Measurement, plan: Plan | None = None) -> Figure:
    """Mean retained mass of candidates against length, at most `MOST_LINES` of them from the sparsest to the densest, and of the
    heads of `plan` with the band from its worst head to its best.

    Raises UserError for a plan whose patterns were not measured.
    """
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    quiet_axes(axes)
    _plot_candidates(axes, measurement)
    if plan is not None:
        _plot_plan(axes, measurement, plan)
    _label(axes, measurement.lengths)
    figure.legend(
        loc="outside lower left",
        fontsize=7,
        frameon=False,
        ncols=1,
        title="candidate: density at the longest",
        title_fontsize=8,
        alignment="left",
    )
    return figure


def _plot_candidates(axes: Axes, measurement: Measurement) -> None:
    by_density = measurement.density[-1].mean((1, 2)).argsort().tolist()
    for place, number in enumerate(spread(by_density, MOST_LINES)):
        density = float(measurement.density[-1, number].mean())
        axes.plot(
            measurement.lengths,
            measurement.retained[:, number].mean((1, 2)),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=1,
            label=f"{shortened(measurement.candidates[number], 80)}: {percent(density)} %",
        )


def _plot_plan(axes: Axes, measurement: Measurement, plan: Plan) -> None:
    kept, lengths = plan_by_length(measurement, plan), list(measurement.lengths)
    label = "the plan, and from its worst head to its best"
    axes.fill_between(lengths, kept.amin((1, 2)), kept.amax((1, 2)), color=GREY, alpha=0.15, linewidth=0)
    axes.plot(lengths, kept.mean((1, 2)), color="black", linewidth=2.2, marker="o", label=label)


def _label(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color="#ececec")
    axes.set_xlabel("length of the text, tokens", fontsize=9)
    axes.set_ylabel("retained mass, mean over heads", fontsize=9)


def plan_by_length(measurement: Measurement, plan: Plan) -> Tensor:
    """float32 [lengths, layers, heads]: measured retained mass of every head's own rule.

    Raises UserError for a plan of another model or with rules that were not measured.
    """
    plan.fingerprint.check_same(measurement.fingerprint, "the plan", "the measurement")
    rules = [[str(rule) for rule in row] for row in plan.patterns]
    unknown = {rule for row in rules for rule in row} - set(measurement.candidates)
    require(
        not unknown, f"the measurement does not know the plan's rule {sorted(unknown)[:1]}: show the one it was fitted from"
    )
    choice = torch.tensor([[measurement.candidates.index(rule) for rule in row] for row in rules])
    place = choice.expand(len(measurement.lengths), 1, *choice.shape)
    return measurement.retained.gather(1, place)[:, 0]


def measurement_text(measurement: Measurement) -> str:
    """One line per candidate: density, retained mass and error at each length, means over heads."""
    header = ["candidate", *(f"{name} at {n}" for n in measurement.lengths for name in ("density %", "retained %", "error"))]
    rows = []
    for number, text in enumerate(measurement.candidates):
        cells = [text]
        for length in range(len(measurement.lengths)):
            density, retained = (float(getattr(measurement, name)[length, number].mean()) for name in ("density", "retained"))
            # Errors of a layer's heads add up.
            cells += [percent(density), percent(retained), f"{float(measurement.error[length, number].sum(-1).mean()):.3g}"]
        rows.append(cells)
    return f"{str(measurement).splitlines()[0]}\n\n{markdown(header, rows)}"
