"""What a layout keeps and changes of one layer's attention: measurements and fidelity are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve.attention import attend
from attnsieve.hf.interface import LayerCall
from attnsieve.layout import Layout


def attended(call: LayerCall, layout: Layout, backend: str) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, Dv] and LSE [B, Hq, Tq] of a whole text's call under `layout`."""
    found = attend(call.query, call.key, call.value, layout, scale=call.scaling, backend=backend, return_lse=True)
    assert isinstance(found, tuple)
    return found


@dataclass(frozen=True, eq=False)
class Effect:
    """What a layout keeps of a text's attention, float64 [query heads] each.

    density: kept pairs over causal pairs. retained: mean over rows of the softmax mass on kept keys. change, size: sums of squares
    of what it changes in the output, and of the output without it.
    """

    density: Tensor
    retained: Tensor
    change: Tensor
    size: Tensor


def effect(call: LayerCall, layout: Layout, whole: tuple[Tensor, Tensor], backend: str, last: int | None = None) -> Effect:
    """Of `layout` on one text's call. whole: what `attended` gives with all keys that the model reads; last: all but the density is
    of these last rows alone."""
    tokens = call.query.shape[2]
    both = attended(call, layout, backend), whole
    (out, lse), (exact, exact_lse) = ([part[0, :, -(last or tokens) :].double() for part in found] for found in both)
    density = layout.density(tokens)[0].to(lse.device)
    return Effect(
        # A layout of KV heads stands for the query heads of each.
        density.repeat_interleave(len(lse) // len(density)),
        # A row's kept share of softmax mass is the ratio of its two partition functions.
        (lse - exact_lse).exp().mean(-1).clamp_max(1),
        (out - exact).square().sum((-2, -1)),
        exact.square().sum((-2, -1)),
    )
