"""Oracles of the selection: the definition written out, the heap, and chunks of keys that compete with the survivors."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.nn.selection import competition_ends


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


def chunked_ends(sigma: Tensor, budget: int, chunk: int) -> Tensor:
    """`competition_ends` of one document per row in O(budget + chunk) working memory: survivors compete with new keys."""
    require(chunk > 0, f"chunk must be positive, got {chunk}")
    n = sigma.shape[-1]
    ends = torch.full(sigma.shape, n, dtype=torch.int32, device=sigma.device)
    alive = torch.empty(*sigma.shape[:-1], 0, dtype=torch.int64, device=sigma.device)
    for first in range(0, n, chunk):
        new = torch.arange(first, min(first + chunk, n), device=sigma.device).expand(*sigma.shape[:-1], -1)
        position = torch.cat([alive, new], dim=-1)
        local = competition_ends(sigma.gather(-1, position), budget).long()
        last = position.shape[-1]
        leaving = position.gather(-1, local.clamp_max(last - 1))
        ends.scatter_(-1, position, torch.where(local < last, leaving, n).to(torch.int32))
        alive = position.gather(-1, _survivors(local, min(budget, last)))
    return ends


def _survivors(ends: Tensor, count: int) -> Tensor:
    """int64 [..., count]: the slots with the largest ends, ascending."""
    return ends.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
