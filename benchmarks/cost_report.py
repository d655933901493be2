"""How well costs predict benchmark rows, and what `auto` loses by them: constants as shipped beside a new fit to the rows.

    python benchmarks/cost_report.py benchmarks/results/kernels.jsonl --device "NVIDIA H100 80GB HBM3"

Errors are those of prefill rows (predicted over measured, minus 1). Held out: the fit to all other shapes predicts one shape, to
all other lengths one length. Regret: where several backends were measured on one mask, the time of the one that constants choose
over the least.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from attnsieve.backends import cost
from attnsieve.bench.case import DENSE
from attnsieve.bench.fit_cost import backend_of, fastest, fit, newest
from attnsieve.bench.rows import read

Row = dict[str, Any]
Constants = dict[str, dict[str, float]]


def predicted(constants: Constants, row: Row) -> float:
    """Milliseconds."""
    known = constants[f"{backend_of(row)} prefill"]
    return sum(known.get(kind, 0.0) * amount for kind, amount in row["work"].items())


def errors(constants: Constants, rows: list[Row]) -> str:
    """A line for each backend that constants know; of the dense kernels the fastest counts."""
    lines = []
    for backend in sorted({backend_of(row) for row in rows if f"{backend_of(row)} prefill" in constants}):
        own = [predicted(constants, row) / row["ms_p20"] - 1 for row in fastest(rows) if backend_of(row) == backend]
        off = torch.tensor(own).abs()
        lines.append(
            f"  {backend:8}{len(own):4} rows, median {off.median():4.0%}, mean {off.mean():4.0%}, worst {off.max():4.0%}"
        )
    return "\n".join(lines)


def regrets(constants: Constants, rows: list[Row]) -> dict[tuple[Any, ...], tuple[float, str]]:
    """(shape, length, mask) -> time of the chosen backend over the least, and who was chosen. Only `dense()` is served dense."""
    measured: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: -row["ms_p20"]):
        if backend_of(row) != cost.DENSE or row["mask"] == DENSE:
            measured[row["shape"], row["kv_len"], row["mask"]][backend_of(row)] = row
    found = {}
    for case, by in measured.items():
        if len(by) > 1:
            chosen = min(by, key=lambda name: predicted(constants, by[name]))
            found[case] = (by[chosen]["ms_p20"] / min(row["ms_p20"] for row in by.values()), chosen)
    return found


def report(shipped: Constants, rows: list[Row], device: str) -> None:
    fitted: Constants = fit(rows)[device]["constants"]
    for name, constants in (("shipped", shipped), ("fitted", fitted)):
        print(f"{name}\n{errors(constants, rows)}")
    for name in ("shape", "kv_len"):
        for value in sorted({row[name] for row in rows}):
            others = fit(row for row in rows if row[name] != value)[device]["constants"]
            print(f"{value}, held out\n{errors(others, [row for row in rows if row[name] == value])}")
    before, after = regrets(shipped, rows), regrets(fitted, rows)
    for name, found in (("shipped", before), ("fitted", after)):
        times = torch.tensor([time for time, _ in found.values()])
        print(f"regret, {name}: mean {times.mean():.3f}, worst {times.max():.3f} of {len(times)} cases")
    for case, (time, chosen) in after.items():
        if before[case][1] != chosen or time > 1.01:
            print(f"  {case}: {before[case][1]} {before[case][0]:.2f} -> {chosen} {time:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    rows = newest(read(arguments.rows))
    of_device = [row for row in rows if row.get("work") and row["device"] == arguments.device and row["op"] == "prefill"]
    report(cost.constants(arguments.device), [row for row in of_device if not row["includes_mask_building"]], arguments.device)


if __name__ == "__main__":
    main()
