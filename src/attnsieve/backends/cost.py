"""What a call would take on each backend, from constants measured on the device at hand (`cost.json`).

    ms = sum over kinds of work of (amount x constant)

Amounts come from `cost_work`, constants from `benchmarks/fit_cost.py`, which fits them to benchmark rows. A device without
constants has no predictions: nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from attnsieve.backends import cost_work
from attnsieve.backends.call import Call
from attnsieve.device import device_name

_FILE = "cost.json"
# What dense attention of any layout's shape is predicted as.
DENSE = "dense"


def predict(call: Call, backends: Sequence[str]) -> dict[str, float]:
    """Milliseconds of `call` for those of `backends` that were measured on its device. Of "dense": what dense attention of
    this shape takes, whether or not the layout keeps everything.

    A layout's work is counted once per power of two in queries and keys and then remembered, which reads the device once.
    """
    found = ((backend, _predict_one(call, backend)) for backend in backends)
    return {backend: ms for backend, ms in found if ms is not None}


def cheapest(call: Call, backends: Sequence[str]) -> str:
    """The backend with the least predicted time; the first one where that is not among those measured."""
    if len(backends) == 1:
        return backends[0]
    predicted = predict(call, backends)
    return min(predicted, key=lambda backend: predicted[backend]) if backends[0] in predicted else backends[0]


def _predict_one(call: Call, backend: str) -> float | None:
    known = constants(device_name(call.q.device)).get(f"{backend} {cost_work.phase(call)}")
    if known is None:
        return None
    key = ("cost", backend, call.group, call.q.dtype, *_bucket(call))
    ms: float | None = call.layout.schedule(key, lambda: weigh(known, cost_work.work(call, backend)))
    return ms


def _bucket(call: Call) -> tuple[int, ...]:
    """Calls of one bucket share a prediction, made for the first of them."""
    return (*(part.bit_length() for part in call.q.shape), call.k.shape[1], call.k.shape[2].bit_length())


def weigh(known: dict[str, float], amounts: dict[str, float] | None) -> float | None:
    """Milliseconds of these amounts of work, None where some kind was not measured."""
    if amounts is None or not amounts.keys() <= known.keys():
        return None
    return sum(known[kind] * amount for kind, amount in amounts.items())


def constants(device: str) -> dict[str, dict[str, float]]:
    """ "backend phase" -> kind of work -> milliseconds per unit, as measured on `device`; empty if it never was."""
    return _table().get(device, {}).get("constants", {})  # type: ignore[no-any-return]


@cache
def _table() -> dict[str, Any]:
    text = files("attnsieve.backends").joinpath(_FILE).read_text()
    table: dict[str, Any] = json.loads(text)
    return table
