"""What a selector reads and what it returns, for one sequence and the heads that share an atom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SequenceQK:
    """q [H, nq, D] and k [H, nk, D] (KV heads repeated per query head) of one sequence; queries are its last positions."""

    q: Tensor
    k: Tensor
    scale: float

    @property
    def first_row(self) -> int:
        """Position of the first query."""
        return self.k.shape[1] - self.q.shape[1]

    def attention(self, rows: Tensor) -> Tensor:
        """float32 [H, rows, nk]: exact causal attention of the queries at absolute positions `rows`."""
        scores = self.q[:, rows - self.first_row].float() @ self.k.float().mT * self.scale
        future = torch.arange(self.k.shape[1], device=rows.device)[None, :] > rows[:, None]
        return scores.masked_fill_(future, -torch.inf).softmax(-1)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A choice in the vectors of a layout: end int32 [H, n], offset bool [H, n], table bool [H, nb, nb] of `block` tokens."""

    end: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None
    block: int = 0


def fewest_with_mass(weights: Tensor, mass: float) -> Tensor:
    """bool like `weights` [..., n]: the fewest entries whose sum reaches `mass` of the total of the last dimension."""
    ordered, order = weights.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    # The largest entry is always kept; the comparison leaves room for the rounding of a float32 sum.
    kept = before < mass * weights.sum(-1, keepdim=True) * (1 - 1e-6)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept) & (weights > 0)
