"""The report of `language.py`: a table, held-out loss by position, loss in training at equal steps."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from experiment import draw, mean_and_error, publish, written

LOOKS = 20  # at the loss in training


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per layer; held-out loss by position of those that trained to the end; loss in training at equal steps."""
    found: dict[str, list[dict[str, Any]]] = {}
    diverged = [f"{row['layer']} seed {row['seed']}" for row in rows if row.get("diverged")]
    rows = latest([row for row in rows if not row.get("diverged")])
    if not rows:
        return
    notes = notes_of(rows) + (f" Weights became NaN, left out: {', '.join(diverged)}." if diverged else "")
    rows = comparable(rows)
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    compared = min(len(row["curve"]) for row in rows) - 1  # the last look that all models had
    body, positions, training = [], {}, {}
    for layer, some in found.items():
        first, losses = some[0], [row["nll"] for row in some]
        size, tokens = f"{first['parameters'] / 1e6:.2f}", f"{first['trained_tokens'] / 1e6:.1f}"
        early = written([row["curve"][compared] for row in some], 2)
        name = layer if all(row["finished"] for row in some) else f"{layer} (cut)"
        body.append([name, size, tokens, early, written(losses, 4), written([math.exp(loss) for loss in losses], 2)])
        shown = min(len(row["curve"]) for row in some)
        training[layer] = [
            (looked(first, look), *mean_and_error([row["curve"][look] for row in some])) for look in range(shown)
        ]
        if all(row["finished"] for row in some):
            points = {last: [row["by_position"][last] for row in some] for last in first["by_position"]}
            positions[layer] = [(float(last), *mean_and_error(values)) for last, values in points.items()]
    step = round(looked(rows[0], compared))
    header = ["attention", "M parameters", "M tokens", f"training batch at step {step}", "held-out", "perplexity"]
    publish(path, "Language models by attention", header, body, notes)
    draw(path, {"held-out loss by position": positions}, "tokens up to", "nats per token")
    target = path.with_name(f"{path.stem}-training")
    draw(target, {"loss of one training batch": training}, "steps", "nats per token", log=False)


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model: of one that ran out of time and was trained again, the later one."""
    return list({(row["layer"], row["seed"]): row for row in rows}.values())


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Models that trained to the end; of a layer without one, those that were cut."""
    ended = {row["layer"] for row in rows if row["finished"]}
    return [row for row in rows if row["finished"] or row["layer"] not in ended]


def looked(row: dict[str, Any], look: int) -> float:
    """The step after which the loss of this place of the curve was seen."""
    return float((look + 1) * max(1, row["steps"] // LOOKS))


def notes_of(rows: list[dict[str, Any]]) -> str:
    notes = f"{rows[0]['length']} tokens a sequence, w = {rows[0]['keep']}, losses in nats per token. Mean and standard error"
    seeds = Counter(row["layer"] for row in comparable(rows))
    more = ", ".join(f"{layer} {count}" for layer, count in seeds.items() if count > 1)
    notes += f" over seeds ({more}; the others one)." if more else " over seeds: 1."
    notes += " Models of a seed train on the same batches, compare them at equal steps."
    cut = (row for row in rows if not row["finished"])
    told = [f"{row['layer']} seed {row['seed']} after {row['trained_tokens'] // row['batch'] // row['length']}" for row in cut]
    if told:
        notes += f" Out of time before the last of {rows[0]['steps']} steps, at a high learning rate: {', '.join(told)};"
        notes += " left out where the layer has another seed."
    return notes
