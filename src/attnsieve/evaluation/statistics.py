"""Means, standard errors and paired tests over items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, or None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value for "the paired differences have mean 0", or None where nothing can be said.

    Differences of right and wrong answers (-1, 0, 1) take McNemar's exact test, others Student's paired t-test.
    """
    if all(difference in (-1, 0, 1) for difference in differences):
        return sign_test(sum(difference > 0 for difference in differences), sum(difference < 0 for difference in differences))
    error = standard_error(differences)
    if not error:
        return None
    return student_p_value(fmean(differences) / error, len(differences) - 1)


def sign_test(better: int, worse: int) -> float:
    """McNemar's exact test: two-sided binomial probability of a split at least as uneven under equal odds."""
    changed = better + worse
    tail = sum(math.comb(changed, count) for count in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def student_p_value(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    # Terms of a series in cos(angle)^2, each from the one before it; odd and even degrees start differently.
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (step - 1) / step
        total += term
    within = (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - within)
