"""Ledger: which runs of a model are done, and the rows that came of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from attnsieve.device import device_name
from attnsieve.environment import environment
from attnsieve.errors import require
from attnsieve.evaluation.rows import Row, append_rows, read_rows
from attnsieve.evaluation.statistics import paired_p_value, standard_error
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.weights import weights_digest
from attnsieve.plan import Plan

# The fields of `rows.IDENTITY`, in its order.
Run = dict[str, Any]
# One item's measures by name.
Measures = dict[str, float]


class Cell(NamedTuple):
    """One task at one length: what the runs of all plans share."""

    task: Task
    length: int
    items: int
    seed: int


def plan_digest(plan: Plan) -> str:
    """16 hex digits over what a plan does: its model and patterns, captured bits included by their digests."""
    config = plan.to_config()
    text = json.dumps([config["fingerprint"], config["patterns"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The rows of one model's runs: those that a file holds already (None: no file), and those that are recorded."""

    def __init__(self, model: Any, out: str | Path | None) -> None:
        self._model, self._dtype = _model_name(model), str(model.dtype).removeprefix("torch.")
        self._out = None if out is None else Path(out)
        self._environment = {"device": device_name(model.device)} | environment()
        self._environment["versions"]["weights"] = weights_digest(model)
        self._rows: dict[tuple[Any, ...], list[Row]] = {}
        for row in [] if self._out is None else read_rows(self._out):
            self._refuse_other_weights(row)
            self._rows.setdefault(row.run, []).append(row)

    def run(self, cell: Cell, name: str, digest: str) -> Run:
        """The run of that plan on a cell."""
        return {
            "model": self._model,
            "dtype": self._dtype,
            "plan": name,
            "plan_digest": digest,
            "task": cell.task.name,
            "variant": cell.task.variant,
            "length": cell.length,
            "items": cell.items,
            "seed": cell.seed,
        }

    def __contains__(self, run: Run) -> bool:
        return _key(run) in self._rows

    def rows(self, run: Run) -> list[Row]:
        """The rows of a run that is done, one per metric."""
        return self._rows[_key(run)]

    def record(self, run: Run, density: float, measures: list[Measures], dense_measures: list[Measures] | None) -> None:
        """Make rows of the measures of all items, and add them to the file. `dense_measures`: None for those of dense attention.

        Raises UserError for measures that are NaN or infinite.
        """
        rows = []
        for metric in measures[0]:
            values = [item[metric] for item in measures]
            against = None if dense_measures is None else [item[metric] for item in dense_measures]
            numbers = {"metric": metric, "density": density, **summary(values, against)}
            rows.append(Row(**run, **numbers, **self._environment))  # type: ignore[arg-type]
        if self._out is not None:
            append_rows(self._out, rows)
        self._rows[_key(run)] = rows

    def _refuse_other_weights(self, row: Row) -> None:
        """Raise UserError for rows of a model that has the name of this one, but was trained in another way."""
        same = (row.model, row.dtype) == (self._model, self._dtype)
        mine = self._environment["versions"]["weights"]
        require(
            # Older rows do not say.
            not same or row.versions.get("weights", mine) == mine,
            f"{self._out} holds rows of a model {row.model!r} with other weights: write to another file, or rename the model",
        )


def _key(run: Run) -> tuple[Any, ...]:
    """As `Row.run` has it."""
    return tuple(run.values())


def summary(values: Sequence[float], dense_values: Sequence[float] | None) -> dict[str, float | None]:
    """The statistical fields of a row: mean and standard error, and the pairing with dense values of the same items."""
    fields: dict[str, float | None] = {"value": fmean(values), "stderr": standard_error(values)}
    if dense_values is None:
        return fields | dict.fromkeys(("dense_value", "paired_difference", "paired_stderr", "p_value"))
    differences = [value - dense_value for value, dense_value in zip(values, dense_values, strict=True)]
    return fields | {
        "dense_value": fmean(dense_values),
        "paired_difference": fmean(differences),
        "paired_stderr": standard_error(differences),
        "p_value": paired_p_value(differences),
    }


def _model_name(model: Any) -> str:
    """The name or path that the model was loaded by, without the folders of this machine."""
    name = str(model.config._name_or_path or model.config.model_type)
    return Path(name).name if Path(name).exists() else name
