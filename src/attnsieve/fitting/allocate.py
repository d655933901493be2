"""Budgets: one candidate per head, spent where it buys most, with a proof of how far from the best it can be.

Choosing one candidate per head under a total density is a multiple-choice knapsack. For a price on density every head's best
choice is independent, and the optimum at any price bounds the optimum of the budget from below (Lagrangian duality).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.errors import require

BISECTIONS = 80


@dataclass(frozen=True, eq=False)
class Allocation:
    """choice: int64 [units], a candidate each. density: mean over units. error: sum over units. bound: no choice within the
    budget has a smaller error than this (for a density budget), or a smaller density (for an error budget)."""

    choice: Tensor
    density: float
    error: float
    bound: float


def within_density(density: Tensor, error: Tensor, budget: float) -> Allocation:
    """The least total error with a mean density of at most `budget`. density, error: float64 [candidates, units].

    Raises UserError that names the least reachable density where no choice fits.
    """
    least = float(density.amin(0).mean())
    require(
        least <= budget * (1 + 1e-9),
        f"no choice of candidates has a density of {budget:g}; the least they reach is {least:.4g}: raise the budget, add "
        "cheaper candidates, or do with fewer guard rails",
    )
    choice, bound = _priced(density, error, budget * density.shape[1])
    return _result(density, error, _refine(density, error, choice, budget * density.shape[1]), bound)


def within_error(density: Tensor, error: Tensor, budget: float) -> Allocation:
    """The least mean density with a total error of at most `budget`; see `within_density`. Raises UserError where none is."""
    least = float(error.amin(0).sum())
    require(
        least <= budget * (1 + 1e-9) + 1e-15,
        f"no choice of candidates has an error of {budget:g}; the least they reach is {least:.4g}",
    )
    choice, bound = _priced(error, density, budget)
    return _result(density, error, _refine(error, density, choice, budget), bound / density.shape[1])


def with_mass(density: Tensor, retained: Tensor, error: Tensor, mass: float) -> Allocation:
    """Per unit the cheapest candidate that retains at least `mass`. Raises UserError where a unit has none."""
    enough = retained >= mass
    short = int((~enough.any(0)).sum())
    most = float(retained.amax(0).min())
    require(not short, f"{short} heads have no candidate that keeps {mass:g} of the mass; every head reaches {most:.4g}")
    choice = torch.where(enough, density, torch.inf).argmin(0)
    result = _result(density, error, choice, 0.0)
    return Allocation(choice, result.density, result.error, result.density)


def _priced(cost: Tensor, loss: Tensor, budget: float) -> tuple[Tensor, float]:
    """The choice of the lowest price at which the total cost fits, and the best lower bound on the loss seen on the way."""
    low, high, bound = 0.0, _high_price(cost, loss), 0.0
    choice = _cheapest(cost, loss, high)
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        candidate = _cheapest(cost, loss, price)
        total = float(_pick(cost, candidate).sum())
        bound = max(bound, float(_pick(loss, candidate).sum()) + price * (total - budget))
        if total <= budget:
            high, choice = price, candidate
        else:
            low = price
    return choice, bound


def _high_price(cost: Tensor, loss: Tensor) -> float:
    """A price at which only cost counts."""
    gaps = (cost[:, None] - cost[None]).abs()
    least = float(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else 1.0
    return float(loss.amax() - loss.amin() + 1) / least


def _cheapest(cost: Tensor, loss: Tensor, price: float) -> Tensor:
    return (loss + price * cost).argmin(0)


def _refine(cost: Tensor, loss: Tensor, choice: Tensor, budget: float) -> Tensor:
    """Spend what a price leaves over: the single exchange that lowers the loss most, while one fits."""
    while True:
        slack = budget - float(_pick(cost, choice).sum())
        gain = _pick(loss, choice)[None] - loss
        fits = (cost - _pick(cost, choice)[None] <= slack) & (gain > 0)
        if not bool(fits.any()):
            return choice
        best = int(torch.where(fits, gain, -torch.inf).argmax())
        candidate, unit = divmod(best, choice.shape[0])
        choice = choice.clone()
        choice[unit] = candidate


def _pick(values: Tensor, choice: Tensor) -> Tensor:
    return values.gather(0, choice[None])[0]


def _result(density: Tensor, error: Tensor, choice: Tensor, bound: float) -> Allocation:
    return Allocation(choice, float(_pick(density, choice).mean()), float(_pick(error, choice).sum()), bound)
