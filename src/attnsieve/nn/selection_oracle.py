"""Oracles of the selection: the definition written out, and the heap."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def brute_force_mask(sigma: Tensor, budget: int) -> Tensor:
    """bool [n, n]: row i keeps the `budget` best of the keys 0 .. i; larger score first, recent first. O(n^2 log n)."""
    n = len(sigma)
    scores = sigma.float().tolist()
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        best = sorted(range(i + 1), key=lambda j: (scores[j], j), reverse=True)
        mask[i, best[:budget]] = True
    return mask


def heap_ends(sigma: Tensor, budget: int) -> Tensor:
    """int32 [n]: the first row that no longer keeps each key. A heap of the kept keys; O(n log budget)."""
    n = len(sigma)
    ends = [n] * n
    kept: list[tuple[float, int]] = []
    for i, score in enumerate(sigma.float().tolist()):
        heapq.heappush(kept, (score, i))
        if len(kept) > budget:
            ends[heapq.heappop(kept)[1]] = i
    return torch.tensor(ends, dtype=torch.int32)
