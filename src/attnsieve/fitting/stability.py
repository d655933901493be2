"""stability: the masks that documents give one by one, tried on one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from attnsieve.errors import require
from attnsieve.fitting.choose import candidates, capture_length
from attnsieve.fitting.expect import Expectation, Observed, expect
from attnsieve.fitting.settings import Settings, resolve
from attnsieve.patterns import FOREVER, Pattern
from attnsieve.patterns.static import Window
from attnsieve.profiling import Profile, Stability


def stability(
    profiles: Sequence[Profile],
    *,
    names: Sequence[str] | None = None,
    preset: str = "robust",
    progress: bool = True,
    **overrides: Any,
) -> Stability:
    """Choose a fixed mask per head from each of `profiles` as `fit` would, dense apart, and try it on all of them.

    One profile per document, or per kind of text. `overrides`: fields of `Settings`. A document's mask for a head is the
    cheapest of the preset's rules that keeps its floor of that document's mass, and where none does, the one that keeps most.
    A head whose masks do not carry to other documents needs to choose its keys from the input, or to stay dense.

    Raises UserError for fewer than two profiles and where `fit` would.
    """
    settings, profiles = resolve(preset, overrides), list(profiles)
    pcl = capture_length(profiles, settings)
    require(len(profiles) >= 2, "stability compares the profiles of at least two documents: profile each by itself")
    names = tuple(names) if names is not None else tuple(f"document {number}" for number in range(len(profiles)))
    require(len(names) == len(profiles), f"{len(names)} names for {len(profiles)} profiles")
    model = profiles[0].fingerprint
    layers = [
        _layer([Observed.of([profile], layer) for profile in profiles], settings, pcl)
        for layer in tqdm(range(model.layers), desc="stability", unit="layer", disable=not progress)
    ]
    overlap, retained, density = (torch.stack(parts, dim=-2).float() for parts in zip(*layers, strict=True))
    length = profiles[0].long[-1].length if profiles[0].long else profiles[0].pcl
    return Stability(model, names, length, overlap, retained, density)


def _layer(documents: list[Observed], settings: Settings, pcl: int) -> tuple[Tensor, Tensor, Tensor]:
    """overlap and retained [D, D, H], density [D, H] of one layer."""
    masks = [_Masks.of(_own_rules(document, settings, pcl), document) for document in documents]
    overlap = [torch.stack([_jaccard(one.below, other.below) for other in masks]) for one in masks]
    tried = [[mask.tried_on(document) for document in documents] for mask in masks]
    retained = [torch.stack([expected.retained for expected in row]) for row in tried]
    return torch.stack(overlap), torch.stack(retained), torch.stack([row[0].density for row in tried])


def _own_rules(document: Observed, settings: Settings, pcl: int) -> list[Pattern]:
    """Per head the fixed rule that serves this document."""
    rules = [rule for rule in candidates(document, settings, pcl) if rule.name in ("dam", "local")]
    enough = torch.stack([torch.minimum(rule.expected.below, rule.expected.beyond) for rule in rules]) >= settings.floor
    cost = torch.stack([rule.expected.density + rule.overhead for rule in rules])
    kept = torch.stack([rule.expected.retained for rule in rules])
    cheapest, best = torch.where(enough, cost, torch.inf).argmin(0), kept.argmax(0)
    choice = torch.where(enough.any(0), cheapest, best) if settings.floor > 0 else torch.zeros_like(best)
    return [rules[number].patterns[head] for head, number in enumerate(choice.tolist())]


class _Masks:
    """Rules of a layer's heads written out for what was observed: below, bool [H, P, P]; columns and offsets, bool [H, n]."""

    def __init__(self, below: Tensor, columns: Tensor, offsets: Tensor) -> None:
        self.below, self._columns, self._offsets = below, columns, offsets

    @classmethod
    def of(cls, rules: list[Pattern], observed: Observed) -> _Masks:
        position = torch.arange(observed.pcl)
        below = torch.stack([rule.keep(position[:, None], position[None, :]) for rule in rules])
        columns = torch.stack([_columns(rule, observed.length) for rule in rules])
        return cls(below, columns, torch.stack([_offsets(rule, observed.length) for rule in rules]))

    def tried_on(self, document: Observed) -> Expectation:
        return expect(document, self.below, self._columns, self._offsets)


def _columns(rule: Pattern, n: int) -> Tensor:
    """bool [n]: keys that all late rows keep."""
    ends = [end for atom in rule if (end := atom.end(n)) is not None and not isinstance(atom, Window)]
    return torch.stack([end == FOREVER for end in ends]).any(0) if ends else torch.zeros(n, dtype=torch.bool)


def _offsets(rule: Pattern, n: int) -> Tensor:
    """bool [n]: distances that late rows keep."""
    kept = [offsets for atom in rule if (offsets := atom.offsets(n)) is not None]
    kept += [torch.arange(n) < atom.tokens for atom in rule if isinstance(atom, Window)]
    return torch.stack(kept).any(0) if kept else torch.zeros(n, dtype=torch.bool)


def _jaccard(one: Tensor, other: Tensor) -> Tensor:
    """float64 [H]: pairs in both masks over pairs in either; bool [H, P, P]. Two empty masks agree."""
    both, either = (one & other).sum((-2, -1)).double(), (one | other).sum((-2, -1)).double()
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)
