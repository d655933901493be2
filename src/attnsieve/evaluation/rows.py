"""Result rows: one JSON object a line, with everything needed to know what was measured and where."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from attnsieve.errors import UserError, require
from attnsieve.files import append_lines, read_utf8

# The fields that tell one run (a plan on a task) from another; the rows of a run are written together.
IDENTITY = ("model", "dtype", "plan", "plan_digest", "task", "variant", "length", "items", "seed")


@dataclass(frozen=True)
class Row:
    """One number: a plan on a task at a length, beside dense attention on the same items.

    plan_digest: 16 hex digits over the plan, or "dense". density: kept pairs over causal pairs, mean of all heads. variant: the
    text or data. length: target length in tokens. items: how many documents. value, stderr: mean and standard error over items
    (null for one item). dense_value, paired_difference (value - dense_value), paired_stderr, p_value: against dense on the same
    items, null in dense rows; the p-value is McNemar's exact test where items are right or wrong, else Student's paired t-test.
    versions: of packages, and as "weights" 8 hex digits of the model's (older rows have none).
    """

    model: str
    dtype: str
    plan: str
    plan_digest: str
    density: float
    task: str
    variant: str
    length: int
    items: int
    seed: int
    metric: str
    value: float
    stderr: float | None
    dense_value: float | None
    paired_difference: float | None
    paired_stderr: float | None
    p_value: float | None
    device: str
    versions: dict[str, str]
    commit: str | None
    command: str
    date: str

    @property
    def run(self) -> tuple[Any, ...]:
        """What identifies the run that the row belongs to: the values of `IDENTITY`."""
        return tuple(getattr(self, name) for name in IDENTITY)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where it does not exist. Raises UserError that names the line which is no row, and for bytes that
    are not UTF-8."""
    kinds = get_type_hints(Row)
    rows = []
    # Not splitlines: inside a row's text JSON leaves separators such as U+2028 as they are.
    lines = read_utf8(path).removesuffix("\n").split("\n") if path.exists() else []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        require(
            isinstance(data, dict) and data.keys() == kinds.keys() and all(_is(kinds[name], data[name]) for name in data),
            f"{path}, line {number} is not an evaluation row (torn by an interrupted run, edited, or of another kind): delete it",
        )
        rows.append(Row(**data))
    return rows


def _is(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON is of a field's type; numbers are finite, and whole ones count as float."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    options = get_args(kind)
    return any(_is(option, value) for option in options) if options else type(value) is kind


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file in one write. Raises UserError for numbers that JSON cannot hold."""
    try:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except ValueError:
        raise UserError("a measured value is NaN or infinite: check the model's weights and dtype") from None
    append_lines(path, text)
