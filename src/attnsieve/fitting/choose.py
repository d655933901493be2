"""fit: candidates per head, the choice among them, and the record of how it came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnsieve import dam
from attnsieve.errors import UserError, require
from attnsieve.fitting.expect import Observed
from attnsieve.fitting.heads import SINKS, Candidate, dam_heads, dense_heads, local_heads
from attnsieve.fitting.settings import Settings, resolve
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Profile


def fit(profile: Profile, *, preset: str = "robust", **overrides: Any) -> Plan:
    """Choose one pattern per layer and query head.

    preset "paper": DAM as published (arXiv 2506.11104), its edge artefacts included. preset "robust": true masks by mass,
    patterns with enough support only, self key and sinks always kept; of that and sink | window each head takes the cheaper one
    that keeps enough mass, and is dense if neither does. `overrides`: fields of `Settings`, such as tau=0.1.

    Raises UserError for unknown settings, a profile without maps, a floor without statistics beyond the capture length, and
    if a head would keep no key in any row.
    """
    settings = resolve(preset, overrides)
    pcl = _capture_length(profile, settings)
    layers = []
    for layer in range(profile.fingerprint.layers):
        observed = Observed.of(profile, layer)
        layers.append(_select(candidates(observed, settings, pcl), settings.floor))
    density, retained = (
        torch.stack([getattr(layer, name) for layer in layers]).clamp(0, 1).float() for name in ("density", "retained")
    )
    provenance = _provenance(profile, preset, settings, pcl, layers)
    return Plan(profile.fingerprint, tuple(layer.patterns for layer in layers), provenance, density, retained)


def candidates(observed: Observed, settings: Settings, pcl: int) -> list[Candidate]:
    """What the heads of one layer may become, DAM first."""
    rules = [dam_heads(observed, settings, pcl)]
    if settings.local:
        rules += [local_heads(observed, settings.floor, sinks) for sinks in SINKS]
    return [*rules, dense_heads(observed)]


@dataclass(frozen=True)
class _Chosen:
    """The choice for one layer; per head unless said otherwise. forced: cells forced into DAM's true masks, all heads."""

    names: list[str]
    patterns: tuple[Pattern, ...]
    reach: list[int | None]
    density: Tensor
    retained: Tensor
    forced: list[int]


def _select(rules: Sequence[Candidate], floor: float) -> _Chosen:
    """Per head the cheapest rule among those that keep `floor` of the mass below and beyond the capture length.

    The last rule keeps everything, so there always is one. With no floor it is the first rule.
    """
    enough = torch.stack([torch.minimum(rule.expected.below, rule.expected.beyond) >= floor for rule in rules])
    cost = torch.stack([rule.expected.density + rule.overhead for rule in rules])
    choice = torch.where(enough, cost, torch.inf).argmin(0) if floor > 0 else torch.zeros(cost.shape[1], dtype=torch.int64)
    picks = [(head, rules[rule]) for head, rule in enumerate(choice.tolist())]
    forced = [0 if rule.forced is None else int(rule.forced[head]) for head, rule in picks]
    return _Chosen(
        names=[rule.name for _, rule in picks],
        patterns=tuple(rule.patterns[head] for head, rule in picks),
        reach=[rule.reach[head] for head, rule in picks],
        density=torch.stack([rule.expected.density for rule in rules]).gather(0, choice[None])[0],
        retained=torch.stack([rule.expected.retained for rule in rules]).gather(0, choice[None])[0],
        forced=forced,
    )


def _capture_length(profile: Profile, settings: Settings) -> int:
    if profile.maps is None:
        raise UserError("this profile has no maps, which fitting starts from: profile again with maps=True")
    pcl = profile.pcl if settings.pcl is None else settings.pcl
    require(
        type(pcl) is int and 0 < pcl <= profile.pcl,
        f"pcl must be from 1 to the profile's {profile.pcl}, got {pcl!r}: profile again for a longer one",
    )
    require(
        settings.floor == 0 or bool(profile.long),
        f"a floor of {settings.floor} must hold beyond the capture length too, where this profile has no statistics: profile "
        f"with lengths=({4 * profile.pcl},), or fit with floor=0 and local=False",
    )
    return pcl


def _provenance(profile: Profile, preset: str, settings: Settings, pcl: int, layers: list[_Chosen]) -> dict[str, Any]:
    """JSON. reach: positions before a late query that it can know of, the sum over layers of how far each looks; None where
    nothing bounds it. reach_bound: layers (L - 1), which holds for any DAM mask of capture length L (first L columns apart).
    """
    reaches = [layer.reach for layer in layers]
    bounded = all(distance is not None for row in reaches for distance in row)
    return {
        "method": "dam",
        "preset": preset,
        "pcl": pcl,
        "settings": settings.to_json(),
        "measured_at": profile.long[-1].length if profile.long else profile.pcl,
        "heads": dict(Counter(name for layer in layers for name in layer.names)),
        "choice": [layer.names for layer in layers],
        "forced_cells": sum(sum(layer.forced) for layer in layers),
        "forced_per_head": [layer.forced for layer in layers],
        "reach": sum(max(distance or 0 for distance in row) for row in reaches) if bounded else None,
        "reach_bound": dam.reach(len(layers), pcl - 1),
        "profile": {
            "documents": int(profile.rows_seen[0]) if profile.rows_seen is not None else 0,
            "lengths": [statistics.length for statistics in profile.long],
            **profile.provenance,
        },
    }
