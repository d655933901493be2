"""The masks of all heads on one page, one small picture each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from attnsieve.errors import require
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from attnsieve.show.canvas import COLOURS, FUTURE, new_figure
from attnsieve.show.grids import label_grid
from attnsieve.show.views import written_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pixels to a side of a head's picture, and between two of them; tokens that it shows.
SIDE, GAP = 48, 5
TOKENS, MOST_TOKENS = 512, 2048
INCHES = 0.5


def mask_gallery(plan: Plan, tokens: int | None = None) -> Figure:
    """Layers downwards, query heads to the right, each head's mask for `tokens` positions, by default twice the capture length.

    Darker where more pairs are kept. A pale blue ground marks heads that choose keys from the input: what is drawn on it they
    keep in any case. Raises UserError for more than `MOST_TOKENS` positions.
    """
    corner = max(rule.corner_rows for row in plan.patterns for rule in row)
    size = tokens or min(max(TOKENS, 2 * corner), MOST_TOKENS)
    require(0 < size <= MOST_TOKENS, f"a gallery shows 1 to {MOST_TOKENS} tokens, got {size}: give a smaller number")
    layers, heads = len(plan.patterns), len(plan.patterns[0])
    pictures = {rule: _picture(rule, size) for rule in dict.fromkeys(rule for row in plan.patterns for rule in row)}
    step = SIDE + GAP
    sheet = torch.ones(layers * step - GAP, heads * step - GAP, 3)
    for layer, row in enumerate(plan.patterns):
        for head, rule in enumerate(row):
            sheet[layer * step : layer * step + SIDE, head * step : head * step + SIDE] = pictures[rule]
    figure = new_figure(max(4.2, INCHES * heads + 0.8), INCHES * layers + 0.9)
    axes = figure.subplots()
    # In units of heads, so that ticks are their numbers.
    axes.imshow(sheet.numpy(), extent=(-0.5, heads - 0.5, layers - 0.5, -0.5), interpolation="antialiased")
    label_grid(axes, plan.fingerprint.indices, heads, f"masks, {size} tokens")
    axes.spines[:].set_visible(False)
    return figure


def _picture(rule: Pattern, tokens: int) -> Tensor:
    """float32 [SIDE, SIDE, 3]: the mask of the rule's static part, averaged to pixels."""
    kept = written_out(Pattern.of(*(atom for atom in rule if not atom.dynamic)), tokens)
    causal = torch.ones(tokens, tokens).tril()
    share, inside = (_reduced(part.float()) for part in (kept, causal))
    share = (share / inside.clamp_min(1e-9)).sqrt()[..., None]
    ground = _colour("#d6ebf7") if rule.dynamic else torch.ones(3)
    picture = ground + share * (_colour("#00263d" if not rule.dynamic else COLOURS[0]) - ground)
    return torch.where(inside[..., None] > 0, picture, _colour(FUTURE))


def _reduced(square: Tensor) -> Tensor:
    """[n, n] -> [SIDE, SIDE]: the mean of the cells that a pixel covers or touches."""
    pooled: Tensor = adaptive_avg_pool2d(square[None], SIDE)[0]
    return pooled


def _colour(text: str) -> Tensor:
    return torch.tensor([int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)])
