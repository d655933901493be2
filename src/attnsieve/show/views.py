"""What is known of one head, gathered for a picture, and which heads are worth one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.dam import EPS, LAM, TAU
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern, dense
from attnsieve.plan import Plan, outline
from attnsieve.profiling import Profile
from attnsieve.show.tables import percent, spread

# Written out as n x n bits: enough to see what a rule does, small enough to hold.
MOST_TOKENS = 8192
DEFAULT_TOKENS = 1024


@dataclass(frozen=True)
class HeadView:
    """One head. mean: float [L, L]; mask: causal bool [L, L], rows below L; extended: causal bool [n, n]; None if unknown.

    captured: whether `mask` is a captured true mask rather than a rule's own rows.
    """

    name: str
    mean: Tensor | None = None
    mask: Tensor | None = None
    extended: Tensor | None = None
    captured: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing of the head can be drawn."""
        return self.mean is None and self.mask is None and self.extended is None


def head_view(
    layer: int, head: int, *, profile: Profile | None = None, plan: Plan | None = None, tokens: int | None = None
) -> HeadView:
    """The view of one head from a profile with maps, a plan, or both.

    The plan's mask is written out for `tokens` positions, by default twice the capture length. Raises UserError for a layer
    or head that does not exist, for a profile and a plan of different models, and for more than `MOST_TOKENS` positions.
    """
    check_place(model_of(profile, plan), layer, head)
    mean = None if profile is None or profile.maps is None else profile.maps[profile.fingerprint.row(layer), head]
    name = f"layer {layer}, head {head}"
    if plan is None:
        return HeadView(name, mean)
    corner = max(rule.corner_rows for row in plan.patterns for rule in row)
    size = tokens or (2 * corner if corner else DEFAULT_TOKENS)
    require(0 < size <= MOST_TOKENS, f"a mask is drawn for 1 to {MOST_TOKENS} tokens, got {size}: give a smaller number")
    rule = plan.row(layer)[head]
    name = "   ".join([name, *_numbers(plan, layer, head), outline(rule)])
    if rule.dynamic:
        return HeadView(name, mean)
    captured = any(isinstance(atom, Captured) for atom in rule)
    return HeadView(name, mean, written_out(rule, corner) if corner else None, written_out(rule, size), captured)


def written_out(pattern: Pattern, tokens: int) -> Tensor:
    """bool [tokens, tokens]: the mask of a static pattern."""
    position = torch.arange(tokens)
    return pattern.keep(position[:, None], position[None, :])


def parse_heads(text: str) -> list[tuple[int, int]]:
    """[(0, 3), (5, 1)] from "0:3,5:1", layer:head, counted from 0. Raises UserError for anything else."""
    places = []
    for part in text.split(","):
        layer, colon, head = part.strip().partition(":")
        good = bool(colon) and layer.strip().isdecimal() and head.strip().isdecimal()
        require(good, f"heads are written layer:head, counted from 0, as in 0:3,5:1; got {part!r}")
        places.append((int(layer), int(head)))
    return places


def typical_heads(plan: Plan, count: int = 4) -> list[tuple[int, int]]:
    """(layer, head) of `count` heads from the sparsest to the densest, leaving out those that stay dense if there are others.

    Without expected densities in the plan they spread over the layers instead.
    """
    model, density = plan.fingerprint, plan.density
    rows = zip(model.indices, plan.patterns, strict=True)
    places = [(layer, head) for layer, row in rows for head, rule in enumerate(row) if rule != dense()]
    if not places:
        return spread_heads(model, count)
    if density is not None:
        places.sort(key=lambda place: (float(density[model.row(place[0]), place[1]]), place))
    return spread(places, count)


def spread_heads(model: Fingerprint, count: int = 4) -> list[tuple[int, int]]:
    """(layer, head) of `count` heads from the first layer to the last, with different head numbers."""
    layers = spread(model.indices, count)
    return [(layer, place * model.heads // len(layers)) for place, layer in enumerate(layers)]


def model_of(profile: Profile | None, plan: Plan | None) -> Fingerprint:
    """The model of both. Raises UserError where they differ."""
    if profile is not None and plan is not None:
        plan.fingerprint.check_same(profile.fingerprint, "the plan", "the profile")
    known = profile or plan
    assert known is not None, "a head is drawn from a profile, a plan, or both"
    return known.fingerprint


def check_place(model: Fingerprint, layer: int, head: int) -> None:
    """Raise UserError unless the model has that head."""
    require(
        layer in model.indices and 0 <= head < model.heads,
        f"there is no layer {layer}, head {head}: the model has {model.listed()} of heads 0 to {model.heads - 1}",
    )


def _numbers(plan: Plan, layer: int, head: int) -> list[str]:
    """Density and retained mass, as far as the plan knows them."""
    return [
        f"{name} {percent(float(share[plan.fingerprint.row(layer), head]))} %"
        for name, share in (("density", plan.density), ("retained mass", plan.retained))
        if share is not None
    ]


def amplification(plan: Plan | None) -> dict[str, float]:
    """lam, eps and tau of the Box-Cox map that the plan was fitted with, the paper's where its provenance does not say."""
    settings = plan.provenance.get("settings", {}) if plan is not None else {}
    return {name: settings.get(name, paper) for name, paper in (("lam", LAM), ("eps", EPS), ("tau", TAU))}
