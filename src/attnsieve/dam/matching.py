"""Pattern matching (arXiv 2506.11104, section 4.2, step 4) by integer sums: O(L^2) work, no pool of pattern masks.

The pool is the diagonals Dg_r = {(i, i - r) : r <= i < L} and columns V_c = {(i, c) : c <= i < L}, so pattern number x of
either family has L - x cells.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnsieve.errors import UserError, require


def column_sums(cells: Tensor) -> Tensor:
    """[..., L]: the sum of each column of causal [..., L, L]; of a bool mask the hits, int64."""
    return cells.sum(-2)


def diagonal_sums(cells: Tensor) -> Tensor:
    """[..., L]: the sum of each diagonal i - j = r of causal [..., L, L]; of a bool mask the hits, int64."""
    size = cells.shape[-1]
    # Behind `size` zeros, diagonal r of row i lies at i (2 size + 1) + size - r: rows of a view with that stride.
    wide = pad(cells, (size, 0)).flatten(-2)
    rows = wide.as_strided((*cells.shape[:-2], size, size), (*wide.stride()[:-1], 2 * size + 1, 1), 1)
    return rows.sum(-2).flip(-1)


def matched(hits: Tensor, *, mu: float | str | Fraction, min_support: int = 1) -> Tensor:
    """bool [..., L]: patterns with hits / n >= mu and n >= min_support cells, n = L - index; in whole numbers, exactly.

    mu may be given as 0.8, "0.8", "4/5" or a Fraction; a float means the decimal number it prints as.
    """
    ratio = exact_ratio(mu)
    cells = torch.arange(hits.shape[-1], 0, -1, device=hits.device)
    return (hits * ratio.denominator >= cells * ratio.numerator) & (cells >= min_support)


def exact_ratio(mu: float | str | Fraction) -> Fraction:
    """mu as the fraction it is written as. Raises UserError outside 0 < mu <= 1."""
    try:
        ratio = Fraction(str(mu))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"mu must be a number or a fraction such as 0.8 or 4/5, got {mu!r}") from None
    require(0 < ratio <= 1, f"mu must be above 0 and at most 1, got {mu}")
    return ratio
