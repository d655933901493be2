"""The true mask M (arXiv 2506.11104, section 4.2, step 3): which cells of the mean map a head really uses.

Maps are [..., L, L], zero above the diagonal; masks are bool of the same shape and causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.dam.boxcox import EPS, LAM, TAU, at_least, cut
from attnsieve.errors import require


def absolute(maps: Tensor, *, tau: float = TAU, lam: float = LAM, eps: float = EPS) -> Tensor:
    """The paper's mask: M[i, j] = 1 iff At[i, j] >= tau and j <= i, computed as Abar >= cut(tau, lam, eps).

    A row keeps at most floor(1 / cut) keys, whatever L is: 44 at the default values.
    """
    return at_least(maps, cut(tau, lam, eps)).tril()


def mass(maps: Tensor, *, share: float) -> Tensor:
    """Per row the fewest cells that hold at least `share` of the row's mean mass. Of equal cells the earliest stay.

    Raises UserError unless 0 < share <= 1.
    """
    require(0 < share <= 1, f"share must be above 0 and at most 1, got {share}")
    ordered, place = torch.sort(maps, dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1)
    enough = share * before[..., -1:]
    before -= ordered
    kept = (before < enough) & (ordered > 0)
    return torch.zeros_like(kept).scatter_(-1, place, kept).tril()


def relative(maps: Tensor, *, kappa: float) -> Tensor:
    """M[i, j] = 1 iff Abar[i, j] >= kappa / (i + 1): kappa times what uniform attention would give the cell.

    At 0 every cell is kept. Raises UserError for less.
    """
    require(kappa >= 0, f"kappa must be at least 0, got {kappa}")
    rows = torch.arange(1, maps.shape[-1] + 1, device=maps.device, dtype=maps.dtype)
    return (maps * rows[:, None] >= kappa).tril()


def force(mask: Tensor, *, self_key: bool, sinks: int) -> tuple[Tensor, Tensor]:
    """`mask` with every query's own key (`self_key`) and the first `sinks` keys added, and the cells added, int64 [...].

    Raises UserError for more sinks than a map has keys.
    """
    size = mask.shape[-1]
    require(0 <= sinks <= size, f"sinks must be from 0 to the capture length {size}, got {sinks}")
    wanted = torch.zeros(size, size, dtype=torch.bool, device=mask.device)
    wanted[:, :sinks] = True
    if self_key:
        wanted.fill_diagonal_(True)
    forced = mask | wanted.tril()
    return forced, (forced ^ mask).sum((-2, -1))


def kept_mass(maps: Tensor, mask: Tensor) -> Tensor:
    """float64 [...]: the share of mass that `mask` keeps, the mean over rows of sum_j Abar M."""
    return (maps * mask).sum((-2, -1), dtype=torch.float64) / maps.shape[-1]
