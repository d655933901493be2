"""The masks that are measured: by name, the same for the same seed; by a pattern's text; or out of a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.layout import Blocks, Layout, compile_layout
from attnsieve.nn.selection import SelectionRule
from attnsieve.patterns import FOREVER, Pattern
from attnsieve.plan import Plan


def blocks(n: int, heads: int, device: torch.device | str, density: float) -> Layout:
    """Random causal blocks of 128 tokens per head, the diagonal one always; `density` of each row of blocks."""
    size = 128
    rows = -(-n // size)
    generator = _generator(device)
    score = torch.rand(heads, rows, rows, generator=generator, device=device)
    row = torch.arange(rows, device=device)
    score = score.masked_fill(row[None, :] > row[:, None], 2.0).masked_fill(
        torch.eye(rows, dtype=torch.bool, device=device), -1
    )
    count = ((row + 1) * density).round().clamp_min(1).to(torch.int32).expand(1, heads, -1).contiguous()
    widest = int(count.max())
    index = score.argsort(-1)[..., :widest]
    index = torch.where(torch.arange(widest, device=device) < count[0, :, :, None], index, rows).sort(-1).values
    index = torch.where(index == rows, -1, index).to(torch.int32)[None].contiguous()
    return Layout(n, torch.zeros(1, heads, n, dtype=torch.int32, device=device), blocks=Blocks(size, size, count, index))


# Sides of mask B: keys at the beginning, columns of a cluster, the first band of diagonals, and the others.
_SINKS, _CLUSTER, _NEAR, _BAND = 64, 24, 256, 61


def columns_and_window(n: int, heads: int, device: torch.device | str, columns: int, window: int) -> Layout:
    """`columns` random kept columns per head and a sliding window."""
    end = torch.arange(n, dtype=torch.int32, device=device).expand(1, heads, n) + window
    return Layout(n, torch.where(_random_keys(n, heads, columns, device), FOREVER, end))


def clusters_and_bands(n: int, heads: int, device: torch.device | str, clusters: int = 39, bands: int = 4) -> Layout:
    """Sinks, clusters of columns, a wide band of diagonals from 0 on and random bands of diagonals per head."""
    position = torch.arange(n, device=device)
    starts = torch.randint(0, n, (heads, clusters, 1), generator=_generator(device), device=device)
    kept = (position < _SINKS).expand(heads, n).clone()
    kept.scatter_(1, ((starts + torch.arange(_CLUSTER, device=device)) % n).flatten(1), True)
    end = torch.where(kept, FOREVER, position + _NEAR).to(torch.int32)[None]
    first = torch.randint(_NEAR, n - _BAND, (heads, bands, 1), generator=_generator(device, 1), device=device)
    offset = torch.zeros(heads, n, dtype=torch.bool, device=device)
    offset.scatter_(1, (first + torch.arange(_BAND, device=device)).flatten(1), True)
    return Layout(n, end, offset[None])


def clusters_and_bands_of(n: int, heads: int, device: torch.device | str, density: float) -> Layout:
    """About that share of the pairs: beside sinks and the first band half of it columns, half diagonals."""
    keys = max(0.0, density * n - _SINKS - _NEAR) / 2
    return clusters_and_bands(n, heads, device, max(1, int(keys / _CLUSTER)), max(1, int(keys / _BAND)))


def columns_and_diagonals(n: int, heads: int, device: torch.device | str, columns: int, diagonals: int) -> Layout:
    """Random kept columns, random single diagonals and a window of 128 per head: the worst case for tiles."""
    layout = columns_and_window(n, heads, device, columns, 128)
    return Layout(n, layout.end, _random_keys(n, heads, diagonals, device, 1)[None])


def selected(n: int, heads: int, device: torch.device | str, budget: int) -> Layout:
    """DMA: the `budget` best keys of each row's prefix by independent scores, for each of `heads` KV heads."""
    rule = SelectionRule(budget)
    return Layout(n, rule.ends(_selection_scores(n, heads, device)), most_keys=rule.slots)


def _selection_scores(n: int, heads: int, device: torch.device | str) -> Tensor:
    return torch.randn(1, heads, n, generator=_generator(device), device=device)


# DMA's masks and the keys that a row of them keeps.
_SELECTED = {f"dma-{budget}": budget for budget in (512, 1024, 2048)}
# From positions, heads and a device.
MASKS: dict[str, Callable[[int, int, torch.device | str], Layout]] = {
    **{f"blocks-{percent}": partial(blocks, density=percent / 100) for percent in (50, 25, 10, 5)},
    "A": lambda n, heads, device: columns_and_diagonals(n, heads, device, n // 32, n // 64),
    "B": clusters_and_bands,
    **{f"B-{percent}": partial(clusters_and_bands_of, density=percent / 100) for percent in (10, 5)},
    "C": partial(columns_and_window, columns=1000, window=1024),
    "columns-50": lambda n, heads, device: columns_and_window(n, heads, device, n // 2, 256),
    "columns-10": lambda n, heads, device: columns_and_window(n, heads, device, n // 11, 256),
    "columns-5": lambda n, heads, device: columns_and_window(n, heads, device, n // 22, 256),
    "columns-2": lambda n, heads, device: columns_and_window(n, heads, device, n // 60, 256),
    **{name: partial(selected, budget=budget) for name, budget in _SELECTED.items()},
}


def mask(name: str, n: int, heads: int, device: torch.device | str) -> Layout:
    """The layout for `heads` heads and n positions of a mask in `MASKS`, of a pattern's text (for every head) such as
    "sink(4) | window(256)", or of one layer of a saved plan, "DIRECTORY:LAYER".

    Raises UserError for an unknown name and for a plan with another number of heads.
    """
    if name in MASKS:
        return MASKS[name](n, heads, device)
    return compile_layout(patterns_of(name, heads), n, device)


def patterns_of(name: str, heads: int) -> tuple[Pattern, ...]:
    """The patterns of a text or of a plan's layer, one per head. Raises UserError for other names and numbers of heads."""
    rule = _rule(name)
    if isinstance(rule, Pattern):
        return (rule,) * heads
    require(len(rule) == heads, f"{name} has {len(rule)} heads, the shape {heads}: choose the shape of the plan's model")
    return rule


def check_mask(name: str) -> None:
    """Raise UserError unless `mask` knows this name, for whichever number of heads."""
    if name not in MASKS:
        _rule(name)


def _rule(name: str) -> Pattern | tuple[Pattern, ...]:
    """The pattern for every head of a text, or those of a plan's layer. Raises UserError for other names."""
    if "(" in name:
        return Pattern.parse(name)
    directory, found, layer = name.rpartition(":")
    known = f"unknown mask {name!r}; choose from {', '.join(MASKS)}, a pattern such as 'sink(4) | window(256)', or PLAN:LAYER"
    require(bool(found) and layer.isdigit(), known)
    return Plan.from_pretrained(directory).row(int(layer))


def is_dynamic(name: str, heads: int) -> bool:
    """Whether the mask is of patterns of which some choose their keys from the input."""
    return name not in MASKS and any(pattern.dynamic for pattern in patterns_of(name, heads))


def is_selected(name: str) -> bool:
    """Whether the mask is DMA's, selected by scores of the values."""
    return name in _SELECTED


def reselected(name: str, layout: Layout) -> Layout:
    """DMA's selection repeated, with nothing remembered."""
    return selected(layout.length, layout.heads, layout.device, _SELECTED[name])


def selection(name: str, layout: Layout) -> Callable[[], Tensor]:
    """DMA's selection alone, given its scores: the ends of all keys."""
    rule, scores = SelectionRule(_SELECTED[name]), _selection_scores(layout.length, layout.heads, layout.device)
    return lambda: rule.ends(scores)


def _generator(device: torch.device | str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _random_keys(n: int, heads: int, count: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """bool [heads, n] with `count` True in every row. Raises UserError where there are fewer keys."""
    require(count <= n, f"this mask keeps {count} keys of every head: use a longer length than {n}")
    score = torch.rand(heads, n, generator=_generator(device, seed), device=device)
    return torch.zeros(heads, n, dtype=torch.bool, device=device).scatter_(1, score.topk(count, dim=-1).indices, True)
