"""evaluate: every plan beside dense attention, on the same items, as result rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

import attnsieve
from attnsieve.errors import require
from attnsieve.evaluation.density import layer_densities
from attnsieve.evaluation.fidelity import layer_fidelity
from attnsieve.evaluation.ledger import Cell, Ledger, Measures, Run, plan_digest
from attnsieve.evaluation.rows import Row
from attnsieve.evaluation.tasks.base import Task
from attnsieve.hf import check_positions, fingerprint, longest_text
from attnsieve.patterns import dense
from attnsieve.plan import Plan

DENSE = "dense"
# Cells whose items and dense results are kept: logits before every answer token.
REMEMBERED = 4


def evaluate(
    model: Any,
    tokenizer: Any,
    plans: Mapping[str, Plan],
    tasks: Sequence[Task],
    lengths: Sequence[int],
    items: int,
    seed: int = 0,
    out: str | Path | None = None,
    *,
    progress: bool = True,
) -> list[Row]:
    """Run the model dense and under every plan on `items` items of every task and length (tokens), and return all rows.

    plans: by the name that rows will carry; "dense" is always run and cannot be a name. out: a JSON-lines file that rows are
    added to as they come; runs whose rows it holds already are read from it instead of repeated.

    Raises UserError for plans of another model, lengths beyond the model's positions, items that a task cannot make, a sparse plan
    under which nothing ran sparse, rows in `out` of a model of this name with other weights, and NaN or infinite results.
    """
    require(items > 0 and all(length > 0 for length in lengths), f"expected positive items and lengths, got {items}, {lengths}")
    require(DENSE not in plans, f"{DENSE!r} is always measured and cannot be the name of a plan: rename it")
    check_positions(model, max(lengths, default=0))
    if plans:  # models that no plan fits have no fingerprint, and are evaluated without any
        mark = fingerprint(model)
        for plan in plans.values():
            plan.check(mark)  # here already: dense attention, which comes first, can take hours
    runs = Runs(model, tokenizer, out, progress=progress)
    return [row for task in tasks for length in lengths for row in runs.cell(Cell(task, length, items, seed), plans)]


class Runs:
    """The runs of one model that a file of rows (None: no file) does not hold yet, cell by cell."""

    def __init__(self, model: Any, tokenizer: Any, out: str | Path | None = None, *, progress: bool = True) -> None:
        require(not model.training, "the model is in training mode, where dropout makes results random: call model.eval()")
        self._model, self._tokenizer, self._progress = model, tokenizer, progress
        self._ledger = Ledger(model, out)
        self._seen: dict[Cell, tuple[list[Any], list[Any], list[Measures]]] = {}

    def cell(self, cell: Cell, plans: Mapping[str, Plan]) -> list[Row]:
        """Rows of dense attention and of every plan on one task and length.

        Items are made, and dense attention is run, once for the calls with a cell among the last few.
        """
        digests = {DENSE: DENSE} | {name: plan_digest(plan) for name, plan in plans.items()}
        runs = {name: self._ledger.run(cell, name, digest) for name, digest in digests.items()}
        missing = {name: run for name, run in runs.items() if run not in self._ledger}
        if missing:
            self._run(cell, plans, missing)
        return [row for run in runs.values() for row in self._ledger.rows(run)]

    def _run(self, cell: Cell, plans: Mapping[str, Plan], missing: Mapping[str, Run]) -> None:
        sparse = [name for name in missing if name != DENSE]
        made = self._seen[cell][0] if cell in self._seen else self._items(cell)
        title = f"{cell.task.name} {cell.length}"
        with tqdm(total=cell.items * (1 + len(sparse)), desc=title, unit="item", disable=not self._progress) as bar:
            # Dense attention runs even where its rows are there: pairs need its value of every item.
            made, seen_dense, dense_measures = self._dense(cell, made, bar)
            if DENSE in missing:
                self._ledger.record(missing[DENSE], 1.0, dense_measures, None)
            for name in sparse:
                plan = plans[name]
                seen, planned = self._observe_sparse(cell.task, made, plan, bar)
                measures = self._measure(cell.task, made, plan, seen, seen_dense)
                self._ledger.record(missing[name], self._density(cell, plan, made[0], planned), measures, dense_measures)

    def _items(self, cell: Cell) -> list[Any]:
        """Raises UserError for texts that a model was not made for: some tasks write beyond the length, or know none."""
        made = list(cell.task.items(self._tokenizer, cell.length, cell.items, cell.seed))
        needed, most = max(cell.task.tokens(self._tokenizer, item) for item in made), longest_text(self._model)
        require(
            most is None or needed <= most,
            f"{cell.task.name} at length {cell.length} has a text of {needed} tokens, its answer included, more than the model's "
            f"{most} positions: use shorter lengths, or a task of shorter texts",
        )
        return made

    def _dense(self, cell: Cell, made: list[Any], bar: Any) -> tuple[list[Any], list[Any], list[Measures]]:
        """Items, what dense attention made of them, and its measures."""
        if cell not in self._seen:
            seen = self._observe(cell.task, made, bar)
            if len(self._seen) == REMEMBERED:
                del self._seen[next(iter(self._seen))]
            self._seen[cell] = (made, seen, self._measure(cell.task, made, None, seen, seen))
        return self._seen[cell]

    def _observe(self, task: Task, made: Sequence[Any], bar: Any) -> list[Any]:
        seen = []
        for one in task.observe_all(self._model, self._tokenizer, made):
            seen.append(one)
            bar.update()
        return seen

    def _observe_sparse(self, task: Task, made: Sequence[Any], plan: Plan, bar: Any) -> tuple[list[Any], bool]:
        """What the plan made of the items, and whether every call ran as it says."""
        with attnsieve.apply(self._model, plan) as handle:
            seen = self._observe(task, made, bar)
        report = handle.report()
        sparse = any(pattern != dense() for row in plan.patterns for pattern in row)
        require(
            not sparse or report.sparse_calls > 0,
            f"the plan is sparse, but nothing ran sparse ({'; '.join(report.unplanned)}): leave it out, or give one that is sparse in "
            "other layers or by other patterns",
        )
        return seen, not report.unplanned

    def _measure(
        self, task: Task, made: Sequence[Any], plan: Plan | None, seen: list[Any], seen_dense: list[Any]
    ) -> list[Measures]:
        return [
            task.measure(one, other) | task.inspect(self._model, plan, item)
            for item, one, other in zip(made, seen, seen_dense, strict=True)
        ]

    def _density(self, cell: Cell, plan: Plan, item: Any, planned: bool) -> float:
        """Counted for static plans at the target length, within the model's own windows; measured on the first item for plans
        that choose from the input, and where layers stayed dense by name."""
        if planned and not plan.dynamic:
            return fmean(layer_densities(self._model, plan, cell.length).values())
        return float(layer_fidelity(self._model, plan, cell.task.ids(self._tokenizer, item)).density.mean())
