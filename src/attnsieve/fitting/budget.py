"""fit_budget: a plan within a density, a retained mass or an output error, from measured candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fitting.allocate import Allocation, with_mass, within_density, within_error
from attnsieve.fitting.guards import place_of_dense, with_dense_decode, with_last_rows
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import DynamicAtom
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement


def fit_budget(
    measurement: Measurement | Sequence[Measurement],
    *,
    density: float | None = None,
    mass: float | None = None,
    max_error: float | None = None,
    share: Literal["none", "kv"] = "none",
    dense_layers: int = 0,
    last_rows: int = 0,
    dense_decode: bool = False,
) -> Plan:
    """Choose one candidate per layer and query head within exactly one budget.

    density: mean density over all heads, the least error for it. mass: every head keeps at least this share of its attention
    mass, as cheaply as it can. max_error: mean over layers of the relative squared output error, the least density for it.
    A candidate counts with its worst measured length; of several measurements, one per kind of text, with its worst kind. That
    keeps a head that one kind needs, which the mean over all kinds would outvote. share="kv" gives the query heads of a KV
    group one mask, so that kernels read each key once for all of them: one pattern, whose dynamic atoms must have been measured
    with share="kv". The budget concerns heads as measured, one at a time on dense inputs.

    Guard rails, paid from the budget: the first `dense_layers` layers (with attention) stay dense; the last `last_rows` queries
    of a prompt keep every key (atom `last_queries`, in blocks of 64 rows), counted from above. Sinks and the newest keys are kept
    where every candidate keeps them, as `default_candidates` does. dense_decode: so do decode steps (atom of that name); budgets
    concern prompts, so it costs nothing of them. Questions at the end of a prompt need both (docs/LOG.md): last_rows=32 covers
    short ones.

    Raises UserError unless exactly one budget is given and reachable (the message says what is), and for measurements of
    different models or candidates.
    """
    name, budget = _only_budget(density=density, mass=mass, max_error=max_error)
    require(share in ("none", "kv"), f'share must be "none" or "kv", got {share!r}')
    measurements = list(measurement) if isinstance(measurement, Iterable) else [measurement]
    strange = [one for one in measurements if not isinstance(one, Measurement)]
    require(
        not strange,
        f"fit_budget takes measurements, got {strange[:1]!r:.80}: load them by Measurement.from_pretrained; of profiles fit",
    )
    measurement = _worst([with_last_rows(one, last_rows) for one in measurements] if last_rows else measurements)
    model = measurement.fingerprint
    _check_sharing(measurement, share)
    require(
        type(dense_layers) is int and 0 <= dense_layers <= model.layers,
        f"dense_layers must be a whole number from 0 to {model.layers}, got {dense_layers!r}",
    )
    require(isinstance(dense_decode, bool), f"dense_decode must be True or False, got {dense_decode!r}")
    if dense_decode:
        measurement = with_dense_decode(measurement)
    if dense_layers:
        measurement = _with_dense_layers(measurement, dense_layers)
    group = model.heads // model.kv_heads if share == "kv" else 1
    guards = {"dense_layers": dense_layers, "last_rows": last_rows, "dense_decode": dense_decode}
    request = {"budget": {name: budget}, "share": share, "guards": guards}
    return _plan(measurement, _allocate(measurement, name, budget, group), group, request)


def _only_budget(**budgets: float | None) -> tuple[str, float]:
    """The name and the value of the one that is given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    require(len(given) == 1, f"give exactly one of density, mass and max_error, got {sorted(given) or 'none'}")
    name, budget = next(iter(given.items()))
    good = isinstance(budget, Real) and 0 < budget <= 1
    require(good, f"{name} must be a number above 0 and at most 1, got {budget!r}")
    return name, budget


def _allocate(measurement: Measurement, name: str, budget: float, group: int) -> Allocation:
    """A candidate for every `group` of heads, by the worst measured length."""
    costs = _units(measurement.density.amax(0), group).mean(-1)
    errors = _units(measurement.error.amax(0), group).sum(-1)
    if name == "density":
        return within_density(costs, errors, budget)
    if name == "max_error":
        return within_error(costs, errors, budget * measurement.fingerprint.layers)
    return with_mass(costs, _units(measurement.retained.amin(0), group).amin(-1), errors, budget)


def _worst(measurements: Sequence[Measurement]) -> Measurement:
    """Per length, candidate and head the largest density and error and the smallest retained mass of those measured there."""
    require(bool(measurements), "fit_budget needs at least one measurement")
    first = measurements[0]
    if len(measurements) == 1:
        return first
    for number, other in enumerate(measurements[1:], 2):
        first.fingerprint.check_same(other.fingerprint, "measurement 1", f"measurement {number}")
        require(
            other.candidates == first.candidates,
            "measurements must agree in candidates: measure every kind of text with the same ones, or the usual ones at one length",
        )
    lengths = sorted({length for one in measurements for length in one.lengths})
    tables = {name: [_at(measurements, name, length) for length in lengths] for name in ("density", "retained", "error")}
    return replace(
        first,
        lengths=tuple(lengths),
        density=torch.stack([kinds.amax(0) for kinds in tables["density"]]),
        retained=torch.stack([kinds.amin(0) for kinds in tables["retained"]]),
        error=torch.stack([kinds.amax(0) for kinds in tables["error"]]),
        provenance={"worst_of": [one.provenance for one in measurements]},
    )


def _at(measurements: Sequence[Measurement], name: str, length: int) -> Tensor:
    """[kinds, candidates, layers, heads]: a table of those that were measured at a length."""
    return torch.stack([getattr(one, name)[one.lengths.index(length)] for one in measurements if length in one.lengths])


def _check_sharing(measurement: Measurement, share: str) -> None:
    """Raise UserError unless dynamic candidates were measured choosing as they will be used."""
    atoms = [atom for text in measurement.candidates for atom in Pattern.parse(text) if isinstance(atom, DynamicAtom)]
    other = [
        str(atom) for atom in atoms if measurement.fingerprint.heads > measurement.fingerprint.kv_heads and atom.share != share
    ]
    require(
        not other,
        f"share={share!r}, but candidates were measured with another: {other[:1]}; measure atoms with share={share!r}, or fit "
        f"with share={'none' if share == 'kv' else 'kv'!r}",
    )


def _with_dense_layers(measurement: Measurement, layers: int) -> Measurement:
    """The first layers' heads cost and keep what dense ones do, whatever is chosen for them."""
    chosen = place_of_dense(measurement)
    tables = {name: getattr(measurement, name).clone() for name in ("density", "retained", "error")}
    for table in tables.values():
        table[:, :, :layers] = table[:, chosen : chosen + 1, :layers]
    return replace(measurement, **tables)


def _units(values: Tensor, group: int) -> Tensor:
    """[candidates, layers, heads] -> float64 [candidates, units, group]: what is chosen together."""
    return values.double().reshape(len(values), -1, group)


def _plan(measurement: Measurement, found: Allocation, group: int, request: dict[str, Any]) -> Plan:
    model = measurement.fingerprint
    choice = found.choice.repeat_interleave(group).view(model.layers, model.heads)
    if request["guards"]["dense_layers"]:
        choice[: request["guards"]["dense_layers"]] = place_of_dense(measurement)
    patterns = [Pattern.parse(text) for text in measurement.candidates]
    rows = tuple(tuple(patterns[c] for c in row) for row in choice.tolist())
    density = measurement.density.amax(0).gather(0, choice[None])[0]
    retained = measurement.retained.amin(0).gather(0, choice[None])[0]
    error = found.error / model.layers
    provenance = {
        "method": "budget",
        **request,
        "lengths": list(measurement.lengths),
        "expected": {"density": found.density, "error_per_layer": error, "retained": float(retained.mean())},
        "bound": found.bound if "density" not in request["budget"] else found.bound / model.layers,
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
