"""Density of patterns and plans: kept pairs over causal pairs, counted exactly."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from attnsieve.hf.dense import why_layer_dense
from attnsieve.hf.geometry import attention_layers
from attnsieve.layout import compile_layout
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan


@lru_cache(maxsize=4096)
def pattern_density(pattern: Pattern, length: int, window: int | None = None) -> float:
    """Share of causal pairs that a static pattern keeps among the first `length` positions, and within a sliding window."""
    return float(compile_layout([pattern], length, window=window).density()[0, 0])


def layer_densities(model: Any, plan: Plan, length: int) -> dict[int, float]:
    """Mean density of the heads of each layer under a static plan at `length`, by the layer's number: of layers with sliding
    windows the pairs inside, 1 for those that must keep the model's own attention, as in `layer_fidelity`."""
    found = {}
    for layer in attention_layers(model):
        row = plan.row(layer.index)
        kept = [1.0] if why_layer_dense(layer, row) else [pattern_density(rule, length, layer.binding_window) for rule in row]
        found[layer.index] = sum(kept) / len(kept)
    return found
