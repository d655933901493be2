"""The table of accuracy in docs/RESULTS.md: what plans lose in every cell, beside dense attention; then who holds the target
where, and which published methods are above ours.

python benchmarks/pareto_summary.py benchmarks/results/eval-spread.jsonl --model qwen2.5-coder-0.5b
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

from pareto_figures import MOST_DENSITY, cached, camp_of, holds, of_most_documents

from attnsieve.evaluation.rows import Row, read_rows
from attnsieve.evaluation.tasks.aligned import MANY
from attnsieve.show import markdown

# What a line is called, and the plan's name in rows.
LINES = {
    "budget 10 %, with rails": "budget-prompt-0.1",
    "budget 20 %, with rails": "budget-prompt-0.2",
    "budget 20 %, rails included": "budget-fitted-prompt-0.2",
    "budget 25 %, rails included": "budget-fitted-prompt-0.25",
    "budget 10 %": "budget-0.1",
    "budget 25 %": "budget-0.25",
    "budget 10 %, keys chosen by all rows": "budget-all-0.1",
    "budget 15 %, keys chosen by all rows": "budget-all-0.15",
    "budget 20 %, keys chosen by all rows": "budget-all-0.2",
    "budget 25 %, keys chosen by all rows": "budget-all-0.25",
    "budget 20 %, rails included, keys chosen by all rows": "budget-all-fitted-prompt-0.2",
    "budget 20 %, no wide windows": "budget-near-0.2",
    "budget 24 %, no wide windows": "budget-near-0.24",
    "budget 20 %, no wide windows, keys chosen by all rows": "budget-all-near-0.2",
    "budget 22 %, no wide windows, keys chosen by all rows": "budget-all-near-0.22",
    "budget 24 %, no wide windows, keys chosen by all rows": "budget-all-near-0.24",
    "the same, every key for rows that ask, included": "budget-all-near-asked-0.24",
    "budget 24 %, no wide windows, every key for rows that ask, included": "budget-near-asked-0.24",
    "budget 20 %, no wide windows, rails included": "budget-near-fitted-prompt-0.2",
    "budget 20 %, no wide windows, rails included, keys chosen by all rows": "budget-all-near-fitted-prompt-0.2",
    "budget 10 %, no wide windows": "budget-near-0.1",
    "budget 10 %, no wide windows, keys chosen by all rows": "budget-all-near-0.1",
    "budget 15 %, no wide windows, keys chosen by all rows": "budget-all-near-0.15",
    "budget 7 %, no wide windows, keys chosen by all rows": "budget-all-near-0.07",
    "budget 5 %, no wide windows, keys chosen by all rows": "budget-all-near-0.05",
    "budget 24 %, no wide windows, measured on single questions too": "budget-answers-0.24",
    "budget 10 %, no wide windows, measured on single questions too": "budget-answers-0.1",
    "budget 5 %, no wide windows, measured on single questions too": "budget-answers-0.05",
    "budget 24 %, no wide windows, measured on single questions too, keys chosen by all rows": "budget-all-answers-0.24",
    "budget 10 %, no wide windows, measured on single questions too, keys chosen by all rows": "budget-all-answers-0.1",
    "budget 7 %, no wide windows, measured on single questions too, keys chosen by all rows": "budget-all-answers-0.07",
    "budget 5 %, no wide windows, measured on single questions too, keys chosen by all rows": "budget-all-answers-0.05",
    "`probed_keys(mass=0.9, rows=32)` in every head": "keys-by-32-0.9",
    "`probed_keys(mass=0.9)` in every head": "keys-0.9",
    "`probed_keys(mass=0.9, rows=64)` in every head": "keys-by-all-0.9",
    "MInference-like, 90 %": "minference-0.9",
    "MInference-like, 90 %, with rails": "minference-prompt-0.9",
    "XAttention-like, 90 %": "xattention-0.9",
    "FlashPrefill-like": "flashprefill-0.1",
    "StreamingLLM, 25 %": "streaming-llm-0.25",
    "sliding window, 25 %": "window-0.25",
    "Longformer, 25 %": "longformer-0.25",
    "BigBird, 25 %": "bigbird-0.25",
    "MoA-like, 25 %": "moa-0.25",
    "H2O-like, 20 %": "h2o-0.2",
    "SnapKV-like, 20 %": "snapkv-0.2",
    "`robust`": "dam-robust-0.9",
    "`adaptive`": "dam-adaptive-0.95",
    "`paper`, capture length 512": "dam-paper-512",
}
NAMES = {"longeval-lines-prefix": "lines"}
# Whether more is better.
BETTER = {"answer_kl": -1, "answer_nll": -1, "exact_match": 1}
# One plan's rows of a cell, by metric.
Run = dict[str, Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(MANY))
    parser.add_argument("--lengths", type=lambda text: list(map(int, text.split(","))), default=[2048, 4096, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(arguments.rows) if row.model == arguments.model and row.dtype == arguments.dtype]
    runs: dict[tuple[str, str, int], Run] = {}
    for row in of_most_documents(rows):
        runs.setdefault((row.plan, row.task, row.length), {})[row.metric] = row
    places = list(product(arguments.tasks, arguments.lengths))
    every = runs_by_place(rows)
    print(table(runs, places), kept_target(runs, places), above(every, places), trailing(every, places), sep="\n\n")


def runs_by_place(rows: list[Row]) -> dict[tuple[str, int], list[Run]]:
    """All sparse runs of a cell, those of a plan on most documents first."""
    runs: dict[tuple[str, str, int, int], Run] = {}
    for row in sorted(rows, key=lambda row: -row.items):
        if row.plan != "dense":
            runs.setdefault((row.plan, row.task, row.length, row.items), {})[row.metric] = row
    places: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for (_, task, length, _), run in runs.items():
        places[task, length].append(run)
    return places


def table(runs: dict[tuple[str, str, int], Run], places: list[tuple[str, int]]) -> str:
    """Points of exact match with their standard errors and nats, per cell; a dash where there is no row."""
    header = ["plan", "density %", *(f"{NAMES.get(task, task)} {length // 1024}K" for task, length in places), "KL"]
    cells = [["dense: right, NLL", "100", *(dense(runs.get(("dense", *place))) for place in places), ""]]
    for name, plan in LINES.items():
        found = [runs.get((plan, *place)) for place in places]
        there = [run for run in found if run]
        if there:
            density = between([100 * run["answer_nll"].density for run in there], percents)
            cells.append([name, density, *map(lost, found), between([run["answer_kl"].value for run in there], nats)])
    return markdown(header, cells, left=(0,))


def dense(run: Run | None) -> str:
    return f"{100 * run['exact_match'].value:.0f}, {nats(run['answer_nll'].value)}" if run else "-"


def lost(run: Run | None) -> str:
    if not run:
        return "-"
    right, nll = run["exact_match"], run["answer_nll"]
    return f"{100 * right.paired_difference:+.0f} ± {100 * right.paired_stderr:.0f}, {nats(nll.paired_difference, '+')}"


def nats(value: float, sign: str = "") -> str:
    """Two digits, of large values one, without the zero before the point."""
    return f"{value:{sign}.1f}" if abs(value) >= 1 else f"{value:{sign}.2f}".replace("0.", ".", 1)


def percents(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}".replace("0.", ".", 1)


def between(values: list[float], write: Callable[[float], str]) -> str:
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def kept_target(runs: dict[tuple[str, str, int], Run], places: list[tuple[str, int]]) -> str:
    """Plans by the cells in which they hold the accuracy target, those in which they were run and are within its density."""
    cells = []
    for plan in sorted({plan for plan, _, _ in runs}):
        there = [run for place in places if (run := runs.get((plan, *place))) and not cached(run) and plan != "dense"]
        within = [run for run in there if run["answer_nll"].density <= MOST_DENSITY]
        held = [run for run in within if holds(run)]
        if held:
            missed = [f"{run['answer_nll'].task[:2]} {run['answer_nll'].length}" for run in within if not holds(run)]
            cells.append([plan, str(len(held)), str(len(within)), str(len(there)), ", ".join(missed)])
    cells.sort(key=lambda row: (-int(row[1]), row[0]))
    return markdown(["plan", "holds", "within 25 %", "run", "does not hold"], cells, left=(0, 4))


def above(every: dict[tuple[str, int], list[Run]], places: list[tuple[str, int]]) -> str:
    """Per cell and metric: the published run that leads the best of ours with no more pairs by most standard errors, or trails it by
    the fewest. Rows of two runs are not paired, so these errors are too large rather than too small. Presets are left out, as are
    runs with fewer pairs than all of ours."""
    cells = []
    for rails, place in product((False, True), places):
        matched = matches([run for run in every[place] if not cached(run)], rails)
        label = f"{NAMES.get(place[0], place[0])} {place[1] // 1024}K{', rails' * rails}"
        cells.append([label, *(farthest(matched, *metric) for metric in BETTER.items())])
    return markdown(["cell", *BETTER], cells, left=(0, 1, 2, 3))


def trailing(every: dict[tuple[str, int], list[Run]], places: list[tuple[str, int]]) -> str:
    """Published runs of all cells by KL beside the best of ours with no more pairs; those of caches count where their prompts are
    sparse."""
    cells = []
    for rails in (False, True):
        leads, fewer = [], 0
        for place in places:
            matched = matches([run for run in every[place] if density_of(run) < 1], rails)
            fewer += sum(not ours for _, ours in matched)
            leads += [lead(run["answer_kl"], best(ours, "answer_kl", -1)["answer_kl"], -1) for run, ours in matched if ours]
        trail = [-errors for errors in leads if errors < 0]
        errors = f"{min(trail):.1f} to {max(trail):.1f}" if trail else "-"
        cells.append(["with rails" if rails else "without", str(len(leads)), str(len(trail)), errors, str(fewer)])
    return markdown(["published, by KL", "runs", "trail ours", "by standard errors", "fewer pairs than ours"], cells, left=(0,))


def matches(there: list[Run], rails: bool) -> list[tuple[Run, list[Run]]]:
    """Every published plan of a cell, with or without rails, with those of ours that have no more pairs on the same documents (without
    presets, with rails only where `rails`). Of a plan run on several sets of documents it is the largest on which there are any of
    ours. Nothing in a cell in which none of ours ran."""
    ours = [run for run in there if camp_of(run) in ((False, False), (False, rails)) and not preset(run)]
    found: dict[str, tuple[Run, list[Run]]] = {}
    for run in there if ours else []:
        name = run["answer_nll"].plan
        if camp_of(run) == (True, rails) and not (name in found and found[name][1]):
            found[name] = run, with_no_more(ours, run)
    return list(found.values())


def with_no_more(ours: list[Run], run: Run) -> list[Run]:
    """Those of ours on the documents of `run` with no more pairs."""
    items = run["answer_nll"].items
    return [own for own in ours if own["answer_nll"].items == items and density_of(own) <= density_of(run)]


def best(ours: list[Run], metric: str, better: int) -> Run:
    return max(ours, key=lambda own: better * own[metric].value)


def farthest(matched: list[tuple[Run, list[Run]]], metric: str, better: int) -> str:
    found = []
    for run, ours in matched:
        if ours:
            own = best(ours, metric, better)
            found.append((lead(run[metric], own[metric], better), run, own))
    if not found:
        return "-"
    errors, run, own = max(found, key=lambda one: one[0])
    return f"{errors:+.1f}: {told(run, metric)}; {told(own, metric)}"


def preset(run: Run) -> bool:
    return run["answer_nll"].plan.startswith("dam")


def density_of(run: Run) -> float:
    return run["answer_nll"].density


def lead(one: Row, other: Row, better: int) -> float:
    """In standard errors of the difference."""
    return better * (one.value - other.value) / math.hypot(one.stderr or 0, other.stderr or 0)


def told(run: Run, metric: str) -> str:
    return f"{run[metric].plan}, {percents(100 * density_of(run))} %, {nats(run[metric].value)}"


if __name__ == "__main__":
    main()
