"""fit: candidates per head, the choice among them, and the record of how it came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnsieve import dam
from attnsieve.errors import UserError, require
from attnsieve.fitting.expect import Observed
from attnsieve.fitting.heads import SINKS, Candidate, adaptive_heads, dam_heads, dense_heads, local_heads
from attnsieve.fitting.settings import Settings, resolve
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Profile


def fit(profile: Profile | Sequence[Profile], *, preset: str = "robust", **overrides: Any) -> Plan:
    """Choose one pattern per layer and query head.

    preset "paper": DAM as published (arXiv 2506.11104), its edge artefacts included. preset "robust": true masks by mass,
    patterns with enough support only, self key and sinks always kept; of that and sink | window each head takes the cheaper one
    that keeps enough mass, and is dense if neither does. preset "adaptive": the same, but a head that no fixed mask serves
    chooses its keys from the input; its plan has no expected density, since that depends on the input. `overrides`: fields of
    `Settings`, such as floor=0.95; those of a threshold that is not used are refused.

    Several profiles, one per kind of text, count alike in DAM's mean maps, and each must meet the floor. That keeps a head that
    one kind of text needs; in one mixed profile the others would outvote it. A plan's retained mass is that of the worst kind.

    Raises UserError for unknown settings, profiles without maps or of different models or lengths, a floor without statistics
    beyond the capture length, and if a head would keep no key in any row.
    """
    settings = resolve(preset, overrides)
    profiles = list(profile) if isinstance(profile, Iterable) else [profile]
    strange = [one for one in profiles if not isinstance(one, Profile)]
    require(
        not strange,
        f"fit takes profiles, got {strange[:1]!r:.80}: load them by Profile.from_pretrained; of measurements fit_budget",
    )
    pcl = capture_length(profiles, settings)
    model, first = profiles[0].fingerprint, settings.dense_layers
    require(first <= model.layers, f"dense_layers must be from 0 to {model.layers}, got {first}")
    layers = []
    for layer in range(model.layers):
        observed = Observed.of(profiles, layer)
        rules = [dense_heads(observed)] if layer < first else candidates(observed, settings, pcl)
        layers.append(_select(rules, settings.floor))
    density, retained = (
        torch.stack([getattr(layer, name) for layer in layers]).clamp(0, 1).float() for name in ("density", "retained")
    )
    provenance = _provenance(profiles, preset, settings, pcl, layers)
    plan = Plan(model, tuple(layer.patterns for layer in layers), provenance)
    return plan if plan.dynamic else replace(plan, density=density, retained=retained)


def candidates(observed: Observed, settings: Settings, pcl: int) -> list[Candidate]:
    """What the heads of one layer may become, DAM first."""
    rules = [dam_heads(observed, settings, pcl)]
    if settings.local:
        rules += [local_heads(observed, settings.floor, sinks) for sinks in SINKS]
    last = dense_heads(observed) if settings.fallback == "dense" else adaptive_heads(observed, settings.floor)
    return [*rules, last]


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


def capture_length(profiles: list[Profile], settings: Settings) -> int:
    """The rows of the maps that a fit uses. Raises UserError unless the profiles can be fitted together."""
    require(bool(profiles), "fit needs at least one profile")
    first = profiles[0]
    for number, other in enumerate(profiles, 1):
        first.fingerprint.check_same(other.fingerprint, "profile 1", f"profile {number}")
        if other.maps is None:
            raise UserError("this profile has no maps, which fitting starts from: profile again with maps=True")
        require(
            (other.pcl, _longest(other)) == (first.pcl, _longest(first)),
            f"profiles must agree in capture length and longest probed length, got {(first.pcl, _longest(first))} and "
            f"{(other.pcl, _longest(other))}: profile all texts with the same pcl and lengths",
        )
    pcl = first.pcl if settings.pcl is None else settings.pcl
    require(
        type(pcl) is int and 0 < pcl <= first.pcl,
        f"pcl must be from 1 to the profile's {first.pcl}, got {pcl!r}: profile again for a longer one",
    )
    require(
        settings.floor == 0 or bool(first.long),
        f"a floor of {settings.floor} must hold beyond the capture length too, where this profile has no statistics: profile "
        f"with lengths=({4 * first.pcl},), or fit with floor=0 and local=False",
    )
    return pcl


def _longest(profile: Profile) -> int:
    """The length up to which a profile knows anything."""
    return profile.long[-1].length if profile.long else profile.pcl


def _provenance(profiles: list[Profile], preset: str, settings: Settings, pcl: int, layers: list[_Chosen]) -> dict[str, Any]:
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
        "measured_at": _longest(profiles[0]),
        "heads": dict(Counter(name for layer in layers for name in layer.names)),
        "choice": [layer.names for layer in layers],
        "forced_cells": sum(sum(layer.forced) for layer in layers),
        "forced_per_head": [layer.forced for layer in layers],
        "reach": sum(max(distance or 0 for distance in row) for row in reaches) if bounded else None,
        "reach_bound": dam.reach(len(layers), pcl - 1),
        "profiles": [_origin(profile) for profile in profiles],
    }


def _origin(profile: Profile) -> dict[str, Any]:
    documents = 0 if profile.rows_seen is None else int(profile.rows_seen[0])
    return {"documents": documents, "lengths": [statistics.length for statistics in profile.long], **profile.provenance}
