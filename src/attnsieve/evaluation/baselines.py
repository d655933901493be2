"""Baselines: named plans from the literature, made of the same atoms as ours.

Each static one has one size, chosen so that the density at a length comes as close to the request as it can without
exceeding it. Dynamic ones choose keys from the input; their strength is a share of attention mass (or a ratio), and result rows
carry the density that was measured. Those made for caches keep a number of keys per query, a share of the length. What each
keeps of its source and what it simplifies is in docs/BASELINES.md.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable

from torch import Tensor

from attnsieve.errors import UserError, require
from attnsieve.evaluation.density import pattern_density
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Pattern, dense_prefill, dilated, heavy_hitters, random_blocks, sink, voted_keys, window
from attnsieve.plan import Plan

# Widths that MoA-like windows are chosen from, as parts of the length.
MOA_PARTS = [1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1]
SINK = 4


def _bigbird(size: int, length: int) -> Pattern:
    # BigBird's blocks have 64 tokens; at short lengths a few of those would be everything.
    block = 64 if length >= 4096 else 16
    return sink(block) | window(size) | random_blocks(max(1, size // block), block=block)


# From a size in tokens and the length to the pattern of every head.
STATIC: dict[str, Callable[[int, int], Pattern]] = {
    # Sliding window.
    "window": lambda size, _: window(size),
    # StreamingLLM (arXiv 2309.17453): four attention sinks and a window.
    "streaming-llm": lambda size, _: sink(SINK) | window(size),
    # Longformer (arXiv 2004.05150) as a decoder: global tokens are the first ones, which all rows read; half of each row's
    # budget is the nearest tokens, half a window dilated by four.
    "longformer": lambda size, _: sink(16) | window(size) | dilated(size, step=4),
    # BigBird (arXiv 2007.14062) as a decoder: a global block, a window, and as many tokens in random blocks.
    "bigbird": _bigbird,
}

# From a strength in (0, 1] to the pattern of every head.
DYNAMIC: dict[str, Callable[[float], Pattern]] = {
    # MInference's vertical-slash (arXiv 2407.02490): the last 64 queries vote; the first 30 tokens and the last 100 stay.
    "minference": lambda mass: Pattern.parse(f"sink(30) | window(100) | vertical_slash(mass={mass}, probe=64, strided=0)"),
    # XAttention (arXiv 2503.16428): blocks by antidiagonal sums.
    "xattention": lambda mass: Pattern.parse(f"antidiagonal_blocks(mass={mass}, block=128, stride=8)"),
    # FlashPrefill's rule: pooled blocks whose weight is a part of the largest; the first and the nearest tokens stay.
    "flashprefill": lambda ratio: Pattern.parse(f"sink(64) | window(64) | pooled_blocks(ratio={ratio}, block=64)"),
}

# From the keys a cache may hold to the pattern of every head.
CACHE: dict[str, Callable[[int], Pattern]] = {
    # H2O (arXiv 2306.14048): half heavy hitters, half the newest keys.
    "h2o": lambda size: heavy_hitters(size - size // 2, max(1, size // 2)),
    # SnapKV (arXiv 2404.14469): the prompt is read densely; its last 32 queries, whose keys stay, vote with pooling over 7 keys.
    "snapkv": lambda size: dense_prefill() | voted_keys(max(1, size - 32), probe=32, pool=7),
}


def static_baseline(name: str, fingerprint: Fingerprint, *, density: float, length: int) -> Plan:
    """The static baseline `name` with at most `density` of the causal pairs at `length`, the same pattern in every head.

    Raises UserError for an unknown name, and with the reachable density where even the smallest size needs more.
    """
    require(name in STATIC, f"unknown static baseline {name!r}; expected one of {', '.join(STATIC)}")
    _check(density, length)
    make = STATIC[name]
    sizes = range(1, length + 1)
    count = bisect_right(sizes, density, key=lambda size: pattern_density(make(size, length), length))
    if count == 0:
        least = pattern_density(make(1, length), length)
        raise UserError(f"{name} keeps at least {least:.4f} of the pairs at length {length}, {density} was asked for: raise it")
    plan = Plan.uniform(fingerprint, make(sizes[count - 1], length))
    return Plan(fingerprint, plan.patterns, {"method": name, "requested_density": density, "length": length})


def dynamic_baseline(name: str, fingerprint: Fingerprint, *, strength: float) -> Plan:
    """The dynamic baseline `name`: strength is the mass to keep (minference, xattention) or the ratio (flashprefill).

    Raises UserError for an unknown name or a strength outside (0, 1].
    """
    require(name in DYNAMIC, f"unknown dynamic baseline {name!r}; expected one of {', '.join(DYNAMIC)}")
    plan = Plan.uniform(fingerprint, DYNAMIC[name](strength))
    return Plan(fingerprint, plan.patterns, {"method": name, "strength": strength})


def cache_baseline(name: str, fingerprint: Fingerprint, *, density: float, length: int) -> Plan:
    """The baseline `name` with as many keys per decode step as `density` of `length` positions, in every head.

    Raises UserError for an unknown name, and for a share that leaves no room beside the 32 newest keys.
    """
    require(name in CACHE, f"unknown cache baseline {name!r}; expected one of {', '.join(CACHE)}")
    _check(density, length)
    size = int(density * length)
    require(size > 32, f"{name} needs a cache of more than 32 keys, {density} of {length} are {size}: raise the density")
    plan = Plan.uniform(fingerprint, CACHE[name](size))
    return Plan(fingerprint, plan.patterns, {"method": name, "requested_density": density, "length": length})


def moa_baseline(fingerprint: Fingerprint, offset_mass: Tensor, *, density: float, length: int) -> Plan:
    """MoA-like (arXiv 2406.14909): four sinks and a window in every head, its width chosen per head.

    offset_mass: [layers, heads, length], attention mass by distance i - j of a profile at this length. Widths grow where one
    more kept pair catches most mass until `density` of the causal pairs is spent. MoA itself measures the influence on the loss
    and fits widths as lines over lengths; this is its mixture of windows, at one length.

    Raises UserError for mass of another shape, and with the reachable density where the narrowest windows need more.
    """
    _check(density, length)
    shape = (fingerprint.layers, fingerprint.heads, length)
    require(
        tuple(offset_mass.shape) == shape, f"offset_mass must be {shape}, got {tuple(offset_mass.shape)}: profile at {length}"
    )
    widths = sorted({max(1, round(length * part)) for part in MOA_PARTS})
    rules = [sink(SINK) | window(width) for width in widths]
    costs = [pattern_density(rule, length) for rule in rules]
    require(costs[0] <= density, f"moa keeps at least {costs[0]:.4f} of the pairs at length {length}, {density} was asked for")
    caught = offset_mass.double().flatten(0, 1).cumsum(-1)[:, [width - 1 for width in widths]]
    chosen = _widen((caught / caught[:, -1:]).tolist(), costs, density * len(caught))
    heads = fingerprint.heads
    patterns = tuple(tuple(rules[choice] for choice in chosen[row : row + heads]) for row in range(0, len(chosen), heads))
    return Plan(fingerprint, patterns, {"method": "moa", "requested_density": density, "length": length})


def _widen(gains: list[list[float]], costs: list[float], budget: float) -> list[int]:
    """A choice per head: gains[head][choice] at costs[choice], total cost within `budget`, steepest steps first.

    Steps go along each head's concave hull, so that stopping anywhere is optimal for what was spent.
    """
    chosen, spent = [0] * len(gains), costs[0] * len(gains)
    hulls = [_hull(costs, gain) for gain in gains]
    steps = [(-_slope(costs, gains[head], *hull[:2]), head, 1) for head, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, head, place = heapq.heappop(steps)
        hull, here = hulls[head], chosen[head]
        cost = costs[hull[place]] - costs[here]
        if spent + cost > budget + 1e-9:
            continue
        chosen[head], spent = hull[place], spent + cost
        if place + 1 < len(hull):
            slope = _slope(costs, gains[head], hull[place], hull[place + 1])
            heapq.heappush(steps, (-slope, head, place + 1))
    return chosen


def _hull(costs: list[float], gain: list[float]) -> list[int]:
    """Choices on the upper concave hull of gain over cost, from the cheapest on."""
    hull: list[int] = []
    for choice in range(len(costs)):
        while len(hull) > 1 and _slope(costs, gain, hull[-1], choice) >= _slope(costs, gain, *hull[-2:]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(costs: list[float], gain: list[float], first: int, second: int) -> float:
    return (gain[second] - gain[first]) / (costs[second] - costs[first])


def _check(density: float, length: int) -> None:
    require(0 < density <= 1, f"a density must be above 0 and at most 1, got {density}")
    require(length > 0, f"a length must be positive, got {length}")
