"""Density of patterns and plans: kept pairs over causal pairs, counted exactly."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from attnsieve.layout import compile_layout
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan


@lru_cache(maxsize=4096)
def pattern_density(pattern: Pattern, length: int) -> float:
    """Share of causal pairs that a static pattern keeps among the first `length` positions."""
    return float(compile_layout([pattern], length).density()[0, 0])


def plan_density(plan: Plan, length: int) -> float:
    """Mean density of all heads of a static plan at `length`. Raises UserError for plans that choose keys from the input."""
    counts = Counter(pattern for row in plan.patterns for pattern in row)
    return sum(pattern_density(pattern, length) * count for pattern, count in counts.items()) / counts.total()
