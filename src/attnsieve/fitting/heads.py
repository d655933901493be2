"""Candidate rules for the heads of one layer: DAM's, a sink with a window, and dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve import dam
from attnsieve.fitting.expect import Expectation, Observed, expect
from attnsieve.fitting.settings import Settings
from attnsieve.patterns import Pattern, dense, sink, window

# Windows are rounded up to this many tokens, and tried with each of these sinks.
WINDOW_STEP = 16
SINKS = (4, 16)


@dataclass(frozen=True)
class Candidate:
    """One rule per head of a layer. reach: how far back each looks from late rows, columns apart; None where all the way."""

    name: str
    patterns: tuple[Pattern, ...]
    expected: Expectation
    reach: tuple[int | None, ...]
    forced: Tensor | None = None


def dam_heads(observed: Observed, settings: Settings, pcl: int) -> Candidate:
    """The paper's steps for every head. `pcl` may be below the profile's; forced: int64 [H], cells forced into true masks."""
    maps = observed.maps[:, :pcl, :pcl]
    mask, forced = dam.force(true_mask(maps, settings), self_key=settings.force_self, sinks=min(settings.force_sink, pcl))
    support = max(1, pcl // 4) if settings.min_support is None else settings.min_support
    diagonal = dam.matched(dam.diagonal_sums(mask), mu=settings.mu, min_support=support)
    column = dam.matched(dam.column_sums(mask), mu=settings.mu, min_support=support)
    make = dam.join if settings.join else dam.extend
    patterns = tuple(make(*head) for head in zip(mask, diagonal, column, strict=True))
    columns, offsets = _widen(column, observed.length), _widen(diagonal, observed.length)
    below = _rule_rows(columns, offsets, observed.pcl)
    if settings.join:
        below[:, :pcl, :pcl] |= mask
    else:
        below[:, :pcl] = False
        below[:, :pcl, :pcl] = mask
    reach = tuple(max(head.nonzero().flatten().tolist(), default=0) for head in diagonal)
    return Candidate("dam", patterns, expect(observed, below, columns, offsets), reach, forced)


def true_mask(maps: Tensor, settings: Settings) -> Tensor:
    """bool, the shape of `maps`: the cells that the settings' threshold keeps."""
    if settings.threshold == "mass":
        return dam.mass(maps, share=settings.share)
    if settings.threshold == "relative":
        return dam.relative(maps, kappa=settings.kappa)
    return dam.absolute(maps, tau=settings.tau, lam=settings.lam, eps=settings.eps)


def local_heads(observed: Observed, floor: float, sinks: int) -> Candidate:
    """sink(sinks) | window(w) with the smallest w per head that keeps `floor` of the mass both below and beyond P.

    w is a multiple of WINDOW_STEP. A head that needs more than a quarter of the probed length is not local; it gets that
    window here and fails the floor.
    """
    most = max(WINDOW_STEP, observed.length // 4 // WINDOW_STEP * WINDOW_STEP)
    columns = (torch.arange(observed.length) < sinks).expand_as(observed.column_mass)
    inside = observed.maps.clone()
    inside[..., :sinks] = 0
    below = dam.diagonal_sums(inside).double() / observed.pcl
    first = [observed.maps[..., :sinks].sum((-2, -1)).double() / observed.pcl, observed.column_mass[:, :sinks].sum(-1)]
    needed = torch.stack(
        [_tokens(mass, floor - kept) for mass, kept in zip((below, observed.beside(columns)), first, strict=True)]
    ).amax(0)
    width = (-(-needed // WINDOW_STEP) * WINDOW_STEP).clamp(WINDOW_STEP, most)
    offsets = torch.arange(observed.length) < width[:, None]
    expected = expect(observed, _rule_rows(columns, offsets, observed.pcl), columns, offsets)
    tokens = width.tolist()
    return Candidate("local", tuple(sink(sinks) | window(w) for w in tokens), expected, tuple(w - 1 for w in tokens))


def dense_heads(observed: Observed) -> Candidate:
    """Every key for every head."""
    heads = len(observed.maps)
    ones = torch.ones(heads, dtype=torch.float64)
    return Candidate("dense", (dense(),) * heads, Expectation(ones, ones, ones, ones), (None,) * heads)


def _tokens(mass: Tensor, wanted: Tensor) -> Tensor:
    """int64 [H]: how many leading entries of `mass` [H, n] it takes to add up to `wanted` [H]."""
    return (mass.cumsum(-1) < wanted[:, None]).sum(-1) + (wanted > 0)


def _widen(chosen: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(chosen, (0, length - chosen.shape[-1]))


def _rule_rows(columns: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """bool [H, rows, rows]: the causal pairs of columns and offsets, bool [H, n]."""
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    return (columns[:, None, :rows] | offsets[:, distance.clamp_min(0)]) & (distance >= 0)
