"""Fit the constants of `backends.cost` to benchmark rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends import cost
from attnsieve.bench.dense import KERNELS
from attnsieve.errors import require

# What is measured, and where.
_CASE = ("device", "op", "backend", "mask", "dtype", "batch", "q_heads", "kv_heads", "head_dim", "q_len", "kv_len")


def fit(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `cost.json` holds for the devices in `rows`: device -> constants, and how they came about.

    Constants are not negative and minimise the relative error of the predictions of `ms_p20`, which other load disturbs least.
    Of repeated measurements the last counts, since kernels change. Of several dense kernels the fastest at each shape counts, which
    is what torch's own choice is taken to be. Raises UserError where no row says what work it was.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in newest(rows):
        if row.get("work") and not row["includes_mask_building"]:
            groups[row["device"]][f"{backend_of(row)} {row['op']}"].append(row)
    require(bool(groups), "no row holds amounts of work: fit to rows of attnsieve bench prefill and decode")
    return {device: _of_device(by_kind) for device, by_kind in groups.items()}


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of the rows of each measurement, by the order in which they are given."""
    return list({tuple(row[name] for name in (*_CASE, "includes_mask_building")): row for row in rows}.values())


def backend_of(row: dict[str, Any]) -> str:
    """Dense kernels of others are one backend; what auto took is that."""
    name: str = row["backend"].removeprefix("auto: ")
    return cost.DENSE if name in KERNELS and name != "fa4" and row["density"] == 1 else name


def _of_device(by_kind: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    constants, errors = {}, {}
    for kind, rows in sorted(by_kind.items()):
        rows = fastest(rows)
        kinds = sorted({name for row in rows for name in row["work"]})
        amounts = torch.tensor([[row["work"].get(name, 0.0) for name in kinds] for row in rows], dtype=torch.float64)
        ms = torch.tensor([row["ms_p20"] for row in rows], dtype=torch.float64)
        found = least_squares(amounts / ms[:, None], torch.ones_like(ms))
        constants[kind] = {name: float(f"{value:.4g}") for name, value in zip(kinds, found.tolist(), strict=True)}
        predicted = amounts @ found / ms
        errors[kind] = {"rows": len(rows), "worst": float(f"{(predicted - 1).abs().max():.2g}")}
    return {"constants": constants, "relative_error": errors, "commits": sorted({str(row["commit"]) for row in _all(by_kind)})}


def _all(by_kind: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for rows in by_kind.values() for row in rows]


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each backend's work, of the dense kernels the fastest."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (backend_of(row), *sorted(row["work"].items()))
        if key not in best or row["ms_p20"] < best[key]["ms_p20"]:
            best[key] = row
    return list(best.values())


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The x >= 0 that minimises |a x - b|, by dropping the most negative unknown until none is left."""
    kept = list(range(a.shape[1]))
    while True:
        # Columns differ by orders of magnitude; scaled to one length they are solved for alike.
        scale = a[:, kept].norm(dim=0).clamp_min(1e-300)
        solution = torch.linalg.lstsq(a[:, kept] / scale, b[:, None], driver="gelsd").solution[:, 0] / scale
        if bool((solution >= 0).all()):
            break
        kept.pop(int((solution * scale).argmin()))
    x = torch.zeros(a.shape[1], dtype=a.dtype)
    x[kept] = solution
    return x
