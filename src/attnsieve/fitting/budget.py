"""fit_budget: a plan within a density, a retained mass or an output error, from measured candidates."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fitting.allocate import Allocation, with_mass, within_density, within_error
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement


def fit_budget(
    measurement: Measurement,
    *,
    density: float | None = None,
    mass: float | None = None,
    max_error: float | None = None,
    share: Literal["none", "kv"] = "none",
) -> Plan:
    """Choose one candidate per layer and query head within exactly one budget.

    density: mean density over all heads, the least error for it. mass: every head keeps at least this share of its attention
    mass, as cheaply as it can. max_error: mean over layers of the relative squared output error, the least density for it.
    A candidate counts with its worst measured length. share="kv" gives the query heads of a KV group one pattern, so that
    kernels read each key once for all of them. The budget concerns heads as measured, one at a time on dense inputs.

    Raises UserError unless exactly one budget is given and reachable; the message says what is reachable.
    """
    budgets = {
        name: value for name, value in (("density", density), ("mass", mass), ("max_error", max_error)) if value is not None
    }
    require(len(budgets) == 1, f"give exactly one of density, mass and max_error, got {sorted(budgets) or 'none'}")
    (name, budget), model = next(iter(budgets.items())), measurement.fingerprint
    require(0 < budget <= 1, f"{name} must be above 0 and at most 1, got {budget!r}")
    require(share in ("none", "kv"), f'share must be "none" or "kv", got {share!r}')
    group = model.heads // model.kv_heads if share == "kv" else 1
    costs = _units(measurement.density.amax(0), group).mean(-1)
    errors = _units(measurement.error.amax(0), group).sum(-1)
    kept = _units(measurement.retained.amin(0), group).amin(-1)
    if name == "density":
        found = within_density(costs, errors, budget)
    elif name == "max_error":
        found = within_error(costs, errors, budget * model.layers)
    else:
        found = with_mass(costs, kept, errors, budget)
    return _plan(measurement, found, name, budget, group)


def _units(values: Tensor, group: int) -> Tensor:
    """[candidates, layers, heads] -> float64 [candidates, units, group]: what is chosen together."""
    return values.double().reshape(len(values), -1, group)


def _plan(measurement: Measurement, found: Allocation, name: str, budget: float, group: int) -> Plan:
    model = measurement.fingerprint
    choice = found.choice.repeat_interleave(group).view(model.layers, model.heads)
    patterns = [Pattern.parse(text) for text in measurement.candidates]
    rows = tuple(tuple(patterns[c] for c in row) for row in choice.tolist())
    density = measurement.density.amax(0).gather(0, choice[None])[0]
    retained = measurement.retained.amin(0).gather(0, choice[None])[0]
    error = found.error / model.layers
    provenance = {
        "method": "budget",
        "budget": {name: budget},
        "share": "kv" if group > 1 else "none",
        "lengths": list(measurement.lengths),
        "expected": {"density": found.density, "error_per_layer": error, "retained": float(retained.mean())},
        "bound": found.bound if name != "density" else found.bound / model.layers,
        "uniform_error_per_layer": _uniform(measurement, found.density),
        "heads": dict(Counter(measurement.candidates[c] for c in choice.flatten().tolist())),
        "measurement": measurement.provenance,
    }
    return Plan(model, rows, provenance, density.clamp(0, 1), retained.clamp(0, 1))


def _uniform(measurement: Measurement, density: float) -> float | None:
    """Error per layer of the best single candidate for all heads that is no denser, for comparison; None if there is none."""
    costs = measurement.density.amax(0).double().mean((1, 2))
    errors = measurement.error.amax(0).double().sum(-1).mean(-1)
    errors = torch.where(costs <= density, errors, torch.inf)
    return float(errors.min()) if bool(errors.isfinite().any()) else None
