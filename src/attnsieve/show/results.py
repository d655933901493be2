"""Evaluation rows as tables and curves: a metric against density, beside dense attention on the same items.

Rows are dictionaries as the evaluation writes them. Read here: task, variant, length, items, metric, plan, density, value,
stderr, dense_value, paired_difference and paired_stderr.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnsieve.errors import require
from attnsieve.show.canvas import COLOURS, GREY, MARKERS, new_figure, quiet_axes
from attnsieve.show.tables import markdown, percent, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
# What rows may differ in besides what curves show.
SOURCE = ("model", "dtype")
# The plan's name in rows of dense attention.
DENSE = "dense"
METRIC_NAMES = {
    "answer_nll": "answer NLL, nats per token",
    "nll": "NLL, nats per token",
    "answer_kl": "KL to dense at the answer, nats",
    "kl": "KL to dense, nats",
    "top1_agreement": "same most likely token",
    "output_error": "relative output error",
}
# Inches; of a letter in the legend at most.
PANEL_WIDTH, PANEL_HEIGHT, LETTER_WIDTH = 3.4, 2.7, 0.085
MOST_PANELS = 24


def result_table(rows: Iterable[Row]) -> str:
    """A Markdown table, one line per row: value with its standard error, dense, and the paired difference with its own.

    Rows of the same task, length and metric stand together.
    """
    header = ["task", "length", "items", "metric", "plan", "density %", "value", "dense", "difference"]
    cells = [
        [
            task_name(row),
            str(row["length"]),
            str(row["items"]),
            str(row["metric"]),
            str(row["plan"]),
            percent(row.get("density")),
            with_error(row["value"], row.get("stderr")),
            with_error(row.get("dense_value")),
            with_error(row.get("paired_difference"), row.get("paired_stderr"), sign=True),
        ]
        for row in sorted(told_apart(list(rows)), key=lambda row: (task_name(row), row["length"], row["metric"]))
    ]
    return markdown(header, cells, left=(0, 3, 4))


def result_figure(rows: Sequence[Row], metric: str) -> Figure:
    """`metric` against density: one panel per task and length, one mark per plan, dense attention as a line.

    Plans that differ only in a number at the end of their names ("budget-0.1", "budget-0.25") are one family, joined by a line
    in the order of their densities. Error bars, and the band around the line of dense attention, are one standard error.

    Raises UserError when no row has the metric, or when there would be more than `MOST_PANELS` panels.
    """
    chosen = [row for row in rows if row["metric"] == metric and row.get("density") is not None]
    known = sorted({str(row["metric"]) for row in rows})
    require(bool(chosen), f"no row with a density has the metric {metric!r}; the rows have: {', '.join(known) or 'nothing'}")
    tasks = sorted({task_name(row) for row in chosen})
    lengths = sorted({int(row["length"]) for row in chosen})
    families = list(dict.fromkeys(family(str(row["plan"])) for row in chosen if row["plan"] != DENSE))
    require(
        len(tasks) * len(lengths) <= MOST_PANELS,
        f"{len(tasks)} tasks x {len(lengths)} lengths are too many panels: choose some",
    )
    width = max(4.6, PANEL_WIDTH * len(lengths) + 0.4)
    columns = max(1, int(width / (0.6 + LETTER_WIDTH * max(len(_label(name)) for name in [*families, "dense attention"]))))
    figure = new_figure(width, PANEL_HEIGHT * len(tasks) + 0.3 + 0.2 * -(-(len(families) + 1) // columns))
    grid = figure.subplots(len(tasks), len(lengths), squeeze=False, sharex=True, sharey="row")
    for task, line in zip(tasks, grid, strict=True):
        for length, axes in zip(lengths, line, strict=True):
            _panel(axes, [row for row in chosen if task_name(row) == task and row["length"] == length], families)
            axes.set_title(f"{task}, {length} tokens", fontsize=9, loc="left")
        line[0].set_ylabel(METRIC_NAMES.get(metric, metric.replace("_", " ")), fontsize=9)
    grid[0, 0].set_xlim(min(0.4, *(70 * row["density"] for row in chosen)), 130)
    for axes in grid[-1]:
        axes.set_xlabel("density, % of causal pairs kept", fontsize=9)
    _legend(figure, families, columns)
    return figure


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of several models or dtypes with both in the names of their variants."""
    differing = [field for field in SOURCE if len({row.get(field) for row in rows}) > 1]
    return [row if not differing else {**row, "variant": _joined(row, "variant", *differing)} for row in rows]


def by_source(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one model in one dtype each, by names that say what differs: "" where there is one."""
    differing = [field for field in SOURCE if len({row.get(field) for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_joined(row, *differing), []).append(row)
    return found


def pages(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in the order of their tasks, in parts that have room in one figure."""
    parts: list[list[Row]] = []
    for task in sorted({task_name(row) for row in rows}):
        own = [row for row in rows if task_name(row) == task]
        if parts and _panels([*parts[-1], *own]) <= MOST_PANELS:
            parts[-1] += own
        else:
            parts.append(own)
    return parts


def _panels(rows: Sequence[Row]) -> int:
    return len({task_name(row) for row in rows}) * len({row["length"] for row in rows})


def _joined(row: Row, *fields: str) -> str:
    return " ".join(str(row[field]) for field in fields if row.get(field))


def task_name(row: Row) -> str:
    """Task and variant, as one name."""
    return f"{row['task']} {row['variant']}" if row.get("variant") else str(row["task"])


def with_error(value: float | None, error: float | None = None, *, sign: bool = False) -> str:
    """ "0.812 ± 0.03", with a sign for differences; "-" where there is no value. An error of 0 is left out."""
    if value is None:
        return "-"
    text = f"{value:+.3g}" if sign else f"{value:.3g}"
    return f"{text} ± {error:.2g}" if error else text


def family(plan: str) -> str:
    """The name of a plan without the number at its end."""
    return re.sub(r"-\d*\.?\d+(e-?\d+)?$", "", plan)


def _panel(axes: Axes, rows: Sequence[Row], families: Sequence[str]) -> None:
    quiet_axes(axes)
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)
    _dense_line(axes, rows)
    for place, name in enumerate(families):
        members = [row for row in rows if row["plan"] != DENSE and family(str(row["plan"])) == name]
        members.sort(key=lambda row: row["density"])
        if members:
            density, value = ([row[field] for row in members] for field in ("density", "value"))
            error = [row.get("stderr") or 0.0 for row in members]
            style = _mark(place) | {"linestyle": "-" if len(members) > 1 else "none", "linewidth": 1.2, "markersize": 6}
            axes.errorbar([100 * share for share in density], value, error, **style, capsize=3, elinewidth=1)


def _dense_line(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row["plan"] == DENSE:
            axes.axhline(row["value"], color=GREY, linewidth=1, linestyle="--")
            error = row.get("stderr") or 0.0
            axes.axhspan(row["value"] - error, row["value"] + error, color=GREY, alpha=0.12, linewidth=0)


def _mark(place: int) -> dict[str, Any]:
    """Families differ in colour and in shape."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": "none"}


def _legend(figure: Figure, families: Sequence[str], columns: int) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], label=_label(name), **_mark(place)) for place, name in enumerate(families)]
    marks.append(Line2D([], [], label="dense attention", color=GREY, linewidth=1, linestyle="--"))
    figure.legend(handles=marks, loc="outside lower left", fontsize=8, frameon=False, ncols=columns)


def _label(plan: str) -> str:
    return shortened(plan, 70)
