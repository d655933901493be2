"""What a plan or a profile says, as data for programs and as text for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from attnsieve.patterns import Pattern, dense
from attnsieve.plan import Plan
from attnsieve.profiling import LongStatistics, Profile
from attnsieve.show.tables import markdown, percent

SINK, LOCAL = 4, 64


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Model, provenance, kinds of heads, and per layer the kinds and the mean density and retained mass (None if unknown)."""
    return {
        "kind": "plan",
        "model": plan.fingerprint.to_json(),
        "provenance": plan.provenance,
        "density": _mean(plan.density),
        "retained": _mean(plan.retained),
        "heads": dict(Counter(_kind(rule) for row in plan.patterns for rule in row)),
        "layers": [
            {
                "layer": layer,
                "density": _mean(plan.density, row),
                "retained": _mean(plan.retained, row),
                "heads": dict(Counter(_kind(rule) for rule in plan.patterns[row])),
            }
            for row, layer in enumerate(plan.fingerprint.indices)
        ],
    }


def plan_text(plan: Plan) -> str:
    """The plan in a few lines, then one line per layer."""
    header = ["layer", "density %", "retained %", "heads"]
    rows = [
        [str(layer["layer"]), percent(layer["density"]), percent(layer["retained"]), _counted(layer["heads"])]
        for layer in plan_summary(plan)["layers"]
    ]
    return f"{plan}\n\n{markdown(header, rows, left=[3])}"


def profile_summary(profile: Profile) -> dict[str, Any]:
    """Model, provenance, what was seen, and per layer the shares of attention on the first keys and on the nearest ones."""
    return {
        "kind": "profile",
        "model": profile.fingerprint.to_json(),
        "provenance": profile.provenance,
        "pcl": profile.pcl,
        "documents": None if profile.rows_seen is None else int(profile.rows_seen[0]),
        "lengths": [statistics.length for statistics in profile.long],
        "layers": [{"layer": layer} | _where(profile, row) for row, layer in enumerate(profile.fingerprint.indices)],
    }


def profile_text(profile: Profile) -> str:
    """The profile in a few lines, then one line per layer: percent of attention on the first and on the nearest keys."""
    layers = profile_summary(profile)["layers"]
    header = [name.replace("_", " ") for name in layers[0]]
    rows = [[str(layer.pop("layer")), *map(percent, layer.values())] for layer in layers]
    caption = f"percent of attention on the first {SINK} keys and on the nearest {LOCAL}, mean over heads and rows"
    return f"{profile}\n{caption}\n\n{markdown(header, rows, left=())}"


def _where(profile: Profile, row: int) -> dict[str, float]:
    """Shares of one layer's attention, below the capture length and at each probed length beyond it."""
    seen = {} if profile.maps is None else {profile.pcl: _where_in_maps(profile.maps[row])}
    seen |= {statistics.length: _where_beyond(statistics, row) for statistics in profile.long}
    names = (f"first_{SINK}", f"nearest_{LOCAL}")
    return {f"{name}_at_{length}": share for length, shares in seen.items() for name, share in zip(names, shares, strict=True)}


def _where_in_maps(maps: Tensor) -> tuple[float, float]:
    """Shares of the mass of [heads, L, L] mean maps on the first keys and on the nearest ones."""
    size = maps.shape[-1]
    far = torch.ones(size, size, dtype=torch.bool).tril(-LOCAL)
    total = maps.sum()
    return float(maps[..., :SINK].sum() / total), 1 - float((maps * far).sum() / total)


def _where_beyond(statistics: LongStatistics, row: int) -> tuple[float, float]:
    total = statistics.rows * len(statistics.column_mass[row])
    first = statistics.column_mass[row, :, :SINK].sum() / total
    near = statistics.offset_mass[row, :, :LOCAL].sum() / total
    return float(first), float(near)


def _kind(rule: Pattern) -> str:
    return "dense" if rule == dense() else "dynamic" if rule.dynamic else "static"


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _mean(share: Tensor | None, row: int | None = None) -> float | None:
    if share is None:
        return None
    return float(share.mean() if row is None else share[row].mean())
