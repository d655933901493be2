"""Candidate rules for the heads of one layer: DAM's, a sink with a window, keys chosen from the input, and dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve import dam
from attnsieve.fitting.expect import Expectation, Observed, expect
from attnsieve.fitting.settings import Settings
from attnsieve.patterns import Pattern, dense, probed_keys, sink, window

# Windows are rounded up to this many tokens, and tried with each of these sinks.
WINDOW_STEP = 16
SINKS = (4, 16)
# Captured bits and scattered keys cost a kernel about a tile of keys per row more than a sink and a window do.
TILE = 64


@dataclass(frozen=True)
class Candidate:
    """One rule per head of a layer. reach: how far back each looks from late rows, columns apart; None where all the way.

    overhead: what the rule's form costs beyond its pairs, as a density.
    """

    name: str
    patterns: tuple[Pattern, ...]
    expected: Expectation
    reach: tuple[int | None, ...]
    forced: Tensor | None = None
    overhead: float = 0.0


def dam_heads(observed: Observed, settings: Settings, pcl: int) -> Candidate:
    """The paper's steps for every head, on the mean map of all profiles, up to `pcl` rows of it.

    forced: int64 [H], cells forced into true masks.
    """
    maps = observed.maps.mean(0)[:, :pcl, :pcl]
    mask, forced = dam.force(true_mask(maps, settings), self_key=settings.force_self, sinks=min(settings.force_sink, pcl))
    support = max(1, pcl // 4) if settings.min_support is None else settings.min_support
    diagonal = dam.matched(dam.diagonal_sums(mask), mu=settings.mu, min_support=support)
    column = dam.matched(dam.column_sums(mask), mu=settings.mu, min_support=support)
    make = dam.join if settings.join else dam.extend
    patterns = tuple(make(*head) for head in zip(mask, diagonal, column, strict=True))
    columns, offsets = _widen(column, observed.length), _widen(diagonal, observed.length)
    below = _rule_rows(columns, offsets, observed.pcl)
    corner = below[:, :pcl, :pcl]
    corner.copy_(corner | mask if settings.join else mask)
    reach = tuple(max(head.nonzero().flatten().tolist(), default=0) for head in diagonal)
    overhead = 2 * TILE / (observed.length + 1)
    return Candidate("dam", patterns, expect(observed, below, columns, offsets), reach, forced, overhead)


def true_mask(maps: Tensor, settings: Settings) -> Tensor:
    """bool, the shape of `maps`: the cells that the settings' threshold keeps."""
    if settings.threshold == "mass":
        return dam.mass(maps, share=settings.share)
    if settings.threshold == "relative":
        return dam.relative(maps, kappa=settings.kappa)
    return dam.absolute(maps, tau=settings.tau, lam=settings.lam, eps=settings.eps)


def local_heads(observed: Observed, floor: float, sinks: int) -> Candidate:
    """sink(sinks) | window(w) with the smallest w per head that keeps `floor` of every profile's mass, below and beyond P.

    w is a multiple of WINDOW_STEP. A head that needs more than a quarter of the probed length is not local: it gets that
    window here, and fails the floor.
    """
    most = max(1, observed.length // 4 // WINDOW_STEP)
    columns = (torch.arange(observed.length) < sinks).expand(observed.heads, -1)
    beside = observed.maps.clone()
    beside[..., :sinks] = 0
    sums = dam.diagonal_sums(beside).double().cumsum(-1)
    short = floor * observed.pcl - observed.maps[..., :sinks].sum((-2, -1), dtype=torch.float64)

    def enough(steps: Tensor) -> Tensor:
        width = steps[:, None] * WINDOW_STEP
        last = (width - 1).clamp_max(observed.pcl - 1).expand(*sums.shape[:-1], 1)
        below = sums.gather(-1, last)[..., 0] >= short
        return (below & (observed.mass(columns, torch.arange(observed.length) < width) >= floor)).all(0)

    width = _least(enough, most, observed.heads) * WINDOW_STEP
    offsets = torch.arange(observed.length) < width[:, None]
    expected = expect(observed, _rule_rows(columns, offsets, observed.pcl), columns, offsets)
    patterns = tuple(sink(sinks) | window(tokens) for tokens in width.tolist())
    return Candidate("local", patterns, expected, tuple(tokens - 1 for tokens in width.tolist()))


def dense_heads(observed: Observed) -> Candidate:
    """Every key for every head."""
    ones = torch.ones(observed.heads, dtype=torch.float64)
    return Candidate("dense", (dense(),) * observed.heads, Expectation(ones, ones, ones, ones), (None,) * observed.heads)


def adaptive_heads(observed: Observed, mass: float) -> Candidate:
    """Single keys with `mass`, chosen from the input for every block of queries, beside a sink and a window.

    A profile cannot tell how many keys that will be: the density stands at 1, which no rule that is known to be enough reaches.
    """
    chosen, ones = sink(SINKS[0]) | window(2 * WINDOW_STEP) | probed_keys(mass=mass), torch.ones(observed.heads).double()
    return Candidate(
        "adaptive", (chosen,) * observed.heads, Expectation(ones, ones, ones, mass * ones), (None,) * observed.heads
    )


def _least(enough: Callable[[Tensor], Tensor], most: int, heads: int) -> Tensor:
    """int64 [H]: per head the least number from 1 that is enough, `most` where none below is. By bisection."""
    low, high = torch.ones(heads, dtype=torch.int64), torch.full((heads,), most)
    while bool((low < high).any()):
        middle = (low + high) // 2
        good = enough(middle)
        low, high = torch.where(good, low, middle + 1), torch.where(good, middle, high)
        low = torch.minimum(low, high)
    return low


def _widen(chosen: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(chosen, (0, length - chosen.shape[-1]))


def _rule_rows(columns: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """bool [H, rows, rows]: the causal pairs of columns and offsets, bool [H, n]."""
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    return (columns[:, None, :rows] | offsets[:, distance.clamp_min(0)]) & (distance >= 0)
