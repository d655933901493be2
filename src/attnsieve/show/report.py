"""One HTML page with everything in it: heads, maps and masks down to single tokens, and result rows. Opens without a network.

The page's own code is in `web/`. Arrays travel as base64 of zlib streams, which browsers unpack by themselves: mean maps as 16-bit
logarithms (a relative step of .04 %), masks as the vectors of their layouts.
"""

from __future__ import annotations

import base64
import html
import json
import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.layout import Layout, compile_layout
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Profile
from attnsieve.show.kinds import KINDS, kind_of
from attnsieve.show.results import Row, told_apart
from attnsieve.show.views import amplification, check_place, model_of, typical_heads

# The page's code, in this order.
SCRIPTS = ("data.js", "panel.js", "heads.js", "curves.js", "rows.js", "main.js")
# Masks are drawn for up to this many tokens, mean maps for as many heads as fit into this many bytes before packing.
TOKENS, MOST_TOKENS = 1024, 4096
MOST_MAP_BYTES = 24 << 20
# Stored logarithms begin at this probability.
FLOOR = 1e-10
MOST_CODE = 65535


def write_report(
    path: str | Path,
    *,
    plan: Plan | None = None,
    profile: Profile | None = None,
    rows: Sequence[Row] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> Path:
    """Write the page and return its path. heads: (layer, head) pairs whose mean maps must be in it; the first one is shown first.

    All heads' maps are, as far as they fit, else an even choice. Raises UserError for another suffix than .html, for nothing to
    show, heads that do not exist, and a plan and a profile of different models.
    """
    target = Path(path)
    require(target.suffix == ".html", f"a report is saved as .html, got {target.name!r}")
    require(
        plan is not None or profile is not None or bool(rows), "a report shows a plan, a profile or rows: give at least one"
    )
    content = report_data(plan, profile, rows, heads)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(content), encoding="utf-8")
    return target


def page(content: dict[str, Any]) -> str:
    """The page for `content`."""
    web = files("attnsieve.show") / "web"
    # Nothing in the data can end the script element that holds it.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n\n".join(_read(web, name) for name in SCRIPTS)
    parts = {"title": html.escape(content["title"]), "style": _read(web, "report.css"), "script": script}
    text = _read(web, "report.html")
    for name, part in {**parts, "data": data}.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def report_data(
    plan: Plan | None, profile: Profile | None, rows: Sequence[Row] | None, heads: Sequence[tuple[int, int]] | None
) -> dict[str, Any]:
    """The JSON that the page reads."""
    model = model_of(profile, plan) if plan is not None or profile is not None else None
    blobs = Blobs()
    content: dict[str, Any] = {
        "title": f"attnsieve: {model.model_type if model else 'result rows'}",
        "layers": model.layers if model else 0,
        "numbers": list(model.indices) if model else [],
        "heads": model.heads if model else 0,
        "pcl": profile.pcl if profile is not None else 0,
        "floor": FLOOR,
        "boxcox": amplification(plan),
        "maps": {},
        "rows": [dict(row) for row in told_apart(rows)] if rows else None,
        "first": "0:0",
        "provenance": {"plan": plan.provenance if plan else None, "profile": profile.provenance if profile else None},
    }
    if model is not None:
        chosen = _order(model, plan, heads)
        content["first"] = "{}:{}".format(*chosen[0])
        if profile is not None and profile.maps is not None:
            content["maps"] = _maps(profile.maps, chosen, blobs)
    if plan is not None:
        content |= _plan(plan, blobs)
    return content | {"summary": _summary(model, plan, profile, content), "blobs": blobs.texts}


class Blobs:
    """Arrays by number, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[bytes, int] = {}

    def add(self, array: np.ndarray[Any, Any] | None) -> int | None:
        """The number of a little-endian array's bytes."""
        if array is None:
            return None
        packed = zlib.compress(array.tobytes(), 6)
        if packed not in self._known:
            self._known[packed] = len(self.texts)
            self.texts.append(base64.b64encode(packed).decode("ascii"))
        return self._known[packed]


def encode_map(mean: Tensor) -> np.ndarray[Any, Any]:
    """uint16 [L (L + 1) / 2]: the lower triangle row by row, 0 for what is below `FLOOR`, else its logarithm."""
    size = len(mean)
    i, j = torch.tril_indices(size, size)
    values = mean[i, j].double().clamp_max(1)
    codes = 1 + (MOST_CODE - 1) * (1 - values.clamp_min(FLOOR).log() / math.log(FLOOR))
    return np.asarray(torch.where(values < FLOOR, 0, codes.round()).to(torch.int32)).astype("<u2")


def _maps(maps: Tensor, chosen: Sequence[tuple[int, int]], blobs: Blobs) -> dict[str, int | None]:
    size = maps.shape[-1]
    most = max(1, MOST_MAP_BYTES // (size * (size + 1)))
    return {f"{layer}:{head}": blobs.add(encode_map(maps[layer, head])) for layer, head in chosen[:most]}


def _order(model: Fingerprint, plan: Plan | None, heads: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """All heads as (row of the artefact, head): those asked for, else typical ones, then every other one, so that any beginning
    is spread over the model."""
    asked = list(heads) if heads else typical_heads(plan) if plan is not None else []
    for layer, head in asked:
        check_place(model, layer, head)
    wanted = [(model.row(layer), head) for layer, head in asked]
    places = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]
    # Multiples of a step without a common divisor visit every place once, spread out.
    step = next(n for n in range(int(len(places) * 0.618) or 1, len(places) + 2) if math.gcd(n, len(places)) == 1)
    spread = [places[(number * step) % len(places)] for number in range(len(places))]
    return list(dict.fromkeys([*wanted, *spread]))


def _plan(plan: Plan, blobs: Blobs) -> dict[str, Any]:
    corner = max(rule.corner_rows for row in plan.patterns for rule in row)
    tokens = min(max(TOKENS, 2 * corner), max(MOST_TOKENS, corner))
    rules = list(dict.fromkeys(rule for row in plan.patterns for rule in row))
    names = list(KINDS)
    kinds = [[names.index(kind_of(rule)) for rule in row] for row in plan.patterns]
    flat = [kind for row in kinds for kind in row]
    number = {rule: place for place, rule in enumerate(rules)}
    return {
        "tokens": tokens,
        "rules": [_rule(rule, tokens, blobs) for rule in rules],
        "choice": [[number[rule] for rule in row] for row in plan.patterns],
        "density": None if plan.density is None else plan.density.tolist(),
        "retained": None if plan.retained is None else plan.retained.tolist(),
        "kind": kinds,
        "kinds": [
            {"name": name, "letter": letter, "colour": colour, "count": flat.count(place)}
            for place, (name, (letter, colour)) in enumerate(KINDS.items())
        ],
    }


def _rule(rule: Pattern, tokens: int, blobs: Blobs) -> dict[str, Any]:
    """One rule as the vectors of its layout; of a rule that chooses from the input, what it keeps in any case."""
    layout = compile_layout([Pattern.of(*(atom for atom in rule if not atom.dynamic))], tokens)
    corner = None if layout.corner is None else layout.corner[0].numpy()
    return {
        "text": str(rule),
        "dynamic": rule.dynamic,
        "captured": any(isinstance(atom, Captured) for atom in rule),
        "rows": 0 if layout.corner_rows is None else int(layout.corner_rows[0]),
        "end": blobs.add(layout.end[0, 0].numpy().astype("<i4")),
        "offset": None if layout.offset is None else blobs.add(_bits(layout.offset[0, 0])),
        "corner": blobs.add(corner),
        "table": _table(layout, blobs),
        "block": None if layout.blocks is None else [layout.blocks.rows, layout.blocks.keys],
    }


def _table(layout: Layout, blobs: Blobs) -> int | None:
    return None if layout.blocks is None else blobs.add(_bits(layout.block_table(0, 0)[:, :-1]))


def _bits(values: Tensor) -> np.ndarray[Any, Any]:
    return np.packbits(values.flatten().numpy(), bitorder="little")


def _summary(model: Fingerprint | None, plan: Plan | None, profile: Profile | None, content: dict[str, Any]) -> str:
    parts = []
    if model is not None:
        parts.append(f"{model.layers} layers of {model.heads} query heads and {model.kv_heads} KV heads")
    if profile is not None:
        held = len(content["maps"])
        parts.append(f"mean maps of {held} of {model.layers * model.heads if model else 0} heads, capture length {profile.pcl}")
    if plan is not None and plan.density is not None:
        parts.append(f"mean density {100 * float(plan.density.mean()):.1f} %")
    if plan is not None and plan.retained is not None:
        parts.append(f"mean retained mass {100 * float(plan.retained.mean()):.1f} %")
    if content["rows"]:
        parts.append(f"{len(content['rows'])} result rows")
    return "; ".join(parts)


def _read(folder: Any, name: str) -> str:
    text: str = (folder / name).read_text(encoding="utf-8")
    return text.rstrip("\n")
