"""stability: the masks that documents give one by one, tried on one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fitting.choose import capture_length
from attnsieve.fitting.expect import Observed, expect
from attnsieve.fitting.heads import dam_rule
from attnsieve.fitting.settings import Settings, resolve
from attnsieve.profiling import Profile, Stability


def stability(
    profiles: Sequence[Profile], *, names: Sequence[str] | None = None, preset: str = "robust", **overrides: Any
) -> Stability:
    """Make a mask per head from each of `profiles` by DAM's steps with the settings of `preset`, and try it on all of them.

    One profile per document, or per kind of text. `overrides`: fields of `Settings`. The preset's choice between DAM, windows
    and dense plays no part: this asks how far a document's own mask carries. A head whose masks do not carry needs to choose
    its keys from the input, or to stay dense.

    Raises UserError for fewer than two profiles and where `fit` would.
    """
    settings, profiles = resolve(preset, overrides), list(profiles)
    pcl = capture_length(profiles, settings)
    require(len(profiles) >= 2, "stability compares the profiles of at least two documents: profile each by itself")
    names = tuple(names) if names is not None else tuple(f"document {number}" for number in range(len(profiles)))
    require(len(names) == len(profiles), f"{len(names)} names for {len(profiles)} profiles")
    model = profiles[0].fingerprint
    layers = [_layer([Observed.of([profile], layer) for profile in profiles], settings, pcl) for layer in range(model.layers)]
    overlap, retained, density = (torch.stack(parts, dim=-2).float() for parts in zip(*layers, strict=True))
    length = profiles[0].long[-1].length if profiles[0].long else profiles[0].pcl
    return Stability(model, names, length, overlap, retained, density)


def _layer(documents: list[Observed], settings: Settings, pcl: int) -> tuple[Tensor, Tensor, Tensor]:
    """overlap and retained [D, D, H], density [D, H] of one layer."""
    rules = [dam_rule(document, settings, pcl) for document in documents]
    overlap = [torch.stack([_jaccard(one.below, other.below) for other in rules]) for one in rules]
    tried = [[expect(document, rule.below, rule.columns, rule.offsets) for document in documents] for rule in rules]
    retained = [torch.stack([expected.retained for expected in row]) for row in tried]
    return torch.stack(overlap), torch.stack(retained), torch.stack([row[0].density for row in tried])


def _jaccard(one: Tensor, other: Tensor) -> Tensor:
    """float64 [H]: pairs in both masks over pairs in either; bool [H, P, P]. Two empty masks agree."""
    both, either = (one & other).sum((-2, -1)).double(), (one | other).sum((-2, -1)).double()
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)
