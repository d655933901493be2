"""The Box-Cox amplification of mean attention (arXiv 2506.11104, section 4.2, steps 1 and 2), literal and in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve.errors import require

# The paper's settings (section 4.2 and appendix B): the threshold on At, the exponent, and what stands for a mean of 0.
TAU, LAM, EPS = 0.3, 0.5, 1e-10


def transform_literal(maps: Tensor, lam: float, eps: float) -> Tensor:
    """At as the paper writes it: B(max(Abar, eps)) minus the least value of B in `maps`. Any shape, dtype kept."""
    amplified = _boxcox(maps.clamp_min(_checked(eps)), lam)
    return amplified - amplified.min()


def transform(maps: Tensor, lam: float, eps: float) -> Tensor:
    """At in closed form, B(max(Abar, eps)) - B(eps); equals the literal form as soon as one cell is at most eps.

    Causality leaves zeros above the diagonal, so every map of two or more rows has one. Any shape, dtype kept. Raises
    UserError unless 0 < eps < 1.
    """
    return _boxcox(maps.clamp_min(_checked(eps)), lam) - _boxcox(maps.new_tensor(eps), lam)


def cut(tau: float, lam: float, eps: float) -> float:
    """The mean attention c for which At >= tau iff Abar >= c: (lam tau + eps^lam)^(1 / lam).

    0 for tau <= 0, where every cell passes; infinity where no probability reaches tau.
    """
    _checked(eps)
    if tau <= 0:
        return 0.0
    # At is 0 at eps and below: rounding must not let cells of no attention reach a small tau.
    return max(_inverse(tau, lam, eps), math.nextafter(eps, math.inf))


def at_least(maps: Tensor, threshold: float) -> Tensor:
    """maps >= threshold, exact although `maps` may have fewer bits than `threshold`."""
    return maps >= rounded_up(threshold, maps.dtype)


def rounded_up(threshold: float, dtype: torch.dtype) -> float:
    """The least number of `dtype` that is at least `threshold`."""
    rounded = torch.tensor(threshold, dtype=dtype)  # on the host, so that nothing waits for a device
    if rounded.double() < threshold:
        rounded = rounded.nextafter(torch.full_like(rounded, torch.inf))
    return rounded.item()


def _boxcox(x: Tensor, lam: float) -> Tensor:
    # expm1 keeps the digits that (x^lam - 1) / lam loses at small lam.
    return x.log() if lam == 0 else (x.log() * lam).expm1() / lam


def _inverse(tau: float, lam: float, eps: float) -> float:
    if lam == 0:
        return eps * _exp(tau)
    above = math.expm1(lam * math.log(eps)) + lam * tau
    if above <= -1:  # a negative lam bounds At from above; else 1 + above is too small for its digits
        return math.inf if lam < 0 else (eps**lam + lam * tau) ** (1 / lam)
    return _exp(math.log1p(above) / lam)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _checked(eps: float) -> float:
    require(0 < eps < 1, f"eps must lie between 0 and 1, got {eps}; the paper uses {EPS}")
    return eps
