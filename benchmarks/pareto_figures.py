"""Figures and tables of `pareto.py`: what a density costs, and which plans keep a model's answers at a quarter of the pairs.

    python benchmarks/pareto_figures.py pareto/ --out benchmarks/results/eval-gpu

Joins the rows of a folder (or reads a file of them) into OUT.jsonl, the summaries of the plans that were run into
OUT-plans.jsonl, draws OUT-MODEL-METRIC.png (into --figures, if given), and writes the tables to OUT.md.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

from pareto import join, plans_of

from attnsieve.evaluation.rows import Row, read_rows
from attnsieve.evaluation.tasks.aligned import MANY
from attnsieve.show import markdown, percent
from attnsieve.show.canvas import save
from attnsieve.show.results import family, result_figure, with_error

# Tasks of the curves; others are in the tables.
DRAWN = tuple(MANY)
METRICS = ("answer_nll", "exact_match", "answer_kl")
# Keys of SnapKV and H2O are counted per decode step, so a density of the prompt says nothing about them.
CACHES = ("snapkv", "h2o")
# In the order of their colours.
SHOWN = (
    "budget", "budget-answers", "budget-all-near", "minference", "budget-all-answers", "budget-near", "budget-all",
    "keys", "keys-by-all", "keys-by-32", "xattention", "moa", "flashprefill", "streaming-llm",
    "bigbird", "longformer", "window", "dam-robust", "dam-adaptive", "budget-kv", "budget-guarded", "keys-guarded",
)  # fmt: skip
# Those whose rows that ask read every key, and decode steps too unless they are called "asked".
SHOWN_PROMPT = (
    "budget-prompt", "keys-prompt", "minference-prompt", "xattention-prompt", "streaming-llm-prompt", "flashprefill-prompt",
    "budget-all-prompt", "budget-fitted-prompt", "budget-all-fitted-prompt",
    "budget-near-fitted-prompt", "budget-all-near-fitted-prompt", "budget-near-asked", "budget-all-near-asked",
)  # fmt: skip
OURS = ("budget", "keys", "dam", "probed")
# Tasks of which the dense model answers less, at every length, are not drawn.
LEAST_RIGHT = 0.1
LEAST_DENSITY, TICKS = 3, (0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 5)  # percent; nats
# What a plan must hold (docs: accuracy target): pairs kept, points of exact match, nats of answer NLL.
MOST_DENSITY, MOST_POINTS, MOST_NLL = 0.25, 0.02, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of pareto.py, or a file of rows")
    parser.add_argument("--join-only", action="store_true", help="write the rows and the plans' summaries, draw nothing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figures", type=Path, help="a folder")
    arguments = parser.parse_args()
    rows = joined(arguments.source, arguments.out) if arguments.source.is_dir() else read_rows(arguments.source)
    if arguments.join_only:
        return
    figures, usual = arguments.figures or arguments.out.parent, main_dtype(rows)
    rows, others = [row for row in rows if row.dtype == usual], [row for row in rows if row.dtype != usual]
    largest = of_most_documents(rows)
    for model, metric in product(sorted({row.model for row in rows}), METRICS):
        own = answerable([row for row in largest if row.model == model and row.task in DRAWN])
        for shown, mark in ((SHOWN, ""), (SHOWN_PROMPT, "-prompt")):
            if any(family(row.plan) in shown for row in own):
                print(save(curves(own, shown, metric), figures / f"{arguments.out.name}-{model}-{metric}{mark}.png"))
    text = "\n\n".join([targets(largest), caches(rows), table(rows), *(other_dtype(others, dtype) for dtype in dtypes(others))])
    arguments.out.with_name(f"{arguments.out.name}.md").write_text(text + "\n", encoding="utf-8")
    print(targets(largest))


def joined(folder: Path, out: Path) -> list[Row]:
    rows = join(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    run = {(row.model, row.length, row.plan_digest) for row in rows}
    plans = [line for line in plans_of(folder, {row.plan for row in rows}) if plan_key(json.loads(line)) in run]
    out.with_name(f"{out.name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    out.with_name(f"{out.name}-plans.jsonl").write_text("".join(f"{line}\n" for line in plans), encoding="utf-8")
    return rows


def plan_key(summary: dict[str, Any]) -> tuple[str, int, str]:
    return summary["model"], summary["length"], summary["plan_digest"]


def of_most_documents(rows: Sequence[Row]) -> list[Row]:
    """Of runs that differ in their number of documents alone, those with the most."""
    most: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        most[cell_of(row)] = max(most[cell_of(row)], row.items)
    return [row for row in rows if row.items == most[cell_of(row)]]


def cell_of(row: Row) -> tuple[Any, ...]:
    return row.model, row.dtype, row.plan, row.task, row.variant, row.length


def answerable(rows: Sequence[Row]) -> list[Row]:
    """Without tasks of which the dense model answers next to nothing, whose curves say little, if it answers any."""
    dense = [row for row in rows if row.plan == "dense" and row.metric == "exact_match"]
    tasks = {row.task for row in dense if row.value >= LEAST_RIGHT}
    return [row for row in rows if row.task in tasks or not tasks]


def curves(rows: Sequence[Row], shown: Sequence[str], metric: str) -> Any:
    """A figure of the `shown` families that there are, in that order; nats on a logarithmic scale, dense attention's 0 left out."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    place = {name: number for number, name in enumerate(shown)}
    sparse = [row for row in rows if family(row.plan) in place]
    cells = {(row.task, row.length) for row in sparse}
    dense = [row for row in rows if row.plan == "dense" and (row.task, row.length) in cells and metric != "answer_kl"]
    drawn = [*dense, *sorted(sparse, key=lambda row: place[family(row.plan)])]
    figure = result_figure([asdict(row) for row in drawn], metric)
    for axes in figure.axes:
        axes.set_xlim(left=LEAST_DENSITY)
        if metric != "exact_match":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(TICKS))
            axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in TICKS]))
            axes.yaxis.set_minor_locator(NullLocator())
    return figure


def main_dtype(rows: Sequence[Row]) -> str:
    """That of most rows; others are there for comparison."""
    return Counter(row.dtype for row in rows).most_common(1)[0][0]


def dtypes(rows: Sequence[Row]) -> list[str]:
    """Those with sparse runs."""
    return sorted({row.dtype for row in rows if row.plan != "dense"})


def other_dtype(rows: Sequence[Row], dtype: str) -> str:
    return f"{dtype}:\n\n{table([row for row in rows if row.dtype == dtype])}"


def runs_of(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[dict[str, Row]]]:
    """Per model, task and length its sparse runs, each as rows by metric."""
    found: dict[tuple[str, str, int], list[dict[str, Row]]] = defaultdict(list)
    for _, run in groupby((row for row in rows if row.plan != "dense"), key=lambda row: row.run):
        metrics = {row.metric: row for row in run}
        first = next(iter(metrics.values()))
        found[first.model, first.task, first.length].append(metrics)
    return dict(sorted(found.items()))


def targets(rows: Sequence[Row]) -> str:
    """Per model, task and length the plan within the density that holds with the least KL, else that with the least KL: of ours
    and of the published ones, sparse everywhere or in the prompt alone."""
    header = [*HEADER, "dense", "difference", "NLL difference", "KL", "holds"]
    cells = []
    for runs in runs_of(rows).values():
        within = [run for run in runs if answers(run) and run["answer_nll"].density <= MOST_DENSITY and not cached(run)]
        for camp in sorted({camp_of(run) for run in within}):
            best = min(
                (run for run in within if camp_of(run) == camp), key=lambda run: (not holds(run), run["answer_kl"].value)
            )
            right, kl = best["exact_match"], best["answer_kl"]
            verdict = "yes" if holds(best) else "no"
            differences = [difference(right), difference(best["answer_nll"])]
            cells.append([*start(best), with_error(right.dense_value), *differences, with_error(kl.value, kl.stderr), verdict])
    return markdown(header, cells, left=(0, 1, 4))


def camp_of(run: dict[str, Row]) -> tuple[bool, bool]:
    """Whether it is published, and whether rows that ask read every key."""
    name = run["answer_nll"].plan
    return not name.startswith(OURS), "-prompt" in name or "-asked" in name


def holds(run: dict[str, Row]) -> bool:
    lost, nll = run["exact_match"].paired_difference, run["answer_nll"].paired_difference
    return lost is not None and nll is not None and lost >= -MOST_POINTS and nll <= MOST_NLL


HEADER = ["model", "task", "length", "items", "plan", "density %", "right"]


def start(run: dict[str, Row]) -> list[str]:
    """The cells of `HEADER`."""
    right = run["exact_match"]
    place = [right.model, right.task, str(right.length), str(right.items), right.plan]
    return [*place, percent(right.density), with_error(right.value, right.stderr)]


def answers(run: dict[str, Row]) -> bool:
    return "answer_nll" in run


def difference(row: Row) -> str:
    return with_error(row.paired_difference, row.paired_stderr, sign=True)


def cached(run: dict[str, Row]) -> bool:
    return next(iter(run.values())).plan.startswith(CACHES)


def caches(rows: Sequence[Row]) -> str:
    """Methods for caches; the number in their names is the share of keys that a decode step reads."""
    header = [*HEADER, "difference", "NLL difference"]
    found = [run for runs in runs_of(rows).values() for run in runs if cached(run) and answers(run)]
    cells = [[*start(run), difference(run["exact_match"]), difference(run["answer_nll"])] for run in found]
    return markdown(header, cells, left=(0, 1, 4))


def table(rows: Sequence[Row]) -> str:
    """Every run, by density."""
    header = [*HEADER, "NLL", "NLL difference", "KL"]
    cells = []
    for runs in runs_of(rows).values():
        for run in sorted(filter(answers, runs), key=lambda run: run["answer_nll"].density):
            nll, kl = (with_error(run[name].value, run[name].stderr) for name in ("answer_nll", "answer_kl"))
            cells.append([*start(run), nll, difference(run["answer_nll"]), kl])
    return markdown(header, cells, left=(0, 1, 4))


if __name__ == "__main__":
    main()
