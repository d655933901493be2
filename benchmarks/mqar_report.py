"""The table and the figure of benchmarks/mqar.py, made of its rows.

Who learns the task within the steps is luck of the seed where it is hard, dense attention included. So models that learned nothing
are counted and kept out of means, and those that ran out of time stand in the table, marked, only where no other model of the
layer trained to its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiment import draw, mean_and_error, publish, written

LAYERS = ("mha", "gqa", "mqa", "mla", "dma", "dma-window", "nsa", "swa")
LEARNED = 2  # times as many right answers as by a guess among the values of the row
NOTES = (
    "Share of asked values that are the most likely token, by pairs; w of the n tokens a row; best of the learning rates."
    " Mean and standard error over the seeds, one seed where no error is given."
    f" Models with fewer than {LEARNED} times as many right answers as guesses among the row's values, all numbers of pairs together,"
    ' have not learned the task within their steps, which does not say that they cannot: left out of means, and told as "(1 of 2)".'
)

Seeds = dict[int, dict[str, float]]  # seed -> accuracy by pairs
Found = dict[str, Seeds]  # of each method


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy by layer, share of keys kept and pairs: the best learning rate of every seed, mean over seeds."""
    rows = sorted(rows, key=lambda row: (not row["convolution"], row["noise"], row["heads"], row["length"], row["width"]))
    ended, cut = (best_rates(row for row in rows if row["finished"] == finished) for finished in (True, False))
    methods = sorted({method(row) for row in rows}, key=lambda name: (LAYERS.index(name.split(",")[0]), name))
    body = []
    for shape in dict.fromkeys(map(named, rows)):
        done, begun = ended.get(shape, {}), cut.get(shape, {})
        for pairs in pairs_of([*done.values(), *begun.values()]):
            cells = [written_cell(done.get(name, {}), begun.get(name, {}), pairs) for name in methods]
            body += [[shape, str(pairs), *cells]] if set(cells) != {"-"} else []
    publish(path, "Associative recall", ["model", "pairs", *methods], body, NOTES + told_cut(rows) + told_diverged(rows))
    panels, marks = panels_of({shape: found for shape, found in ended.items() if "no convolution" not in shape} or ended)
    if panels:  # none where all layers keep all keys
        draw(path, panels, "pairs (dashed: w)", "accuracy", marks=marks)


def best_rates(rows: Iterable[dict[str, Any]]) -> dict[str, Found]:
    """By shape and method: every seed's accuracies with its best learning rate."""
    best: dict[str, Found] = {}
    for row in rows:
        of_seed = best.setdefault(named(row), {}).setdefault(method(row), {})
        earlier = of_seed.get(row["seed"], {})
        if not earlier or sum(row["accuracy"].values()) > sum(earlier.values()):
            of_seed[row["seed"]] = row["accuracy"]
    return best


def learned(seeds: Seeds) -> Seeds:
    """Without models that guess."""
    return {
        seed: accuracy
        for seed, accuracy in seeds.items()
        if sum(accuracy.values()) >= LEARNED * sum(1 / int(pairs) for pairs in accuracy)
    }


def written_cell(ended: Seeds, cut: Seeds, pairs: int) -> str:
    """ "0.812 ± 0.010", "0.812 (1 of 2)", "not learned", "0.812 cut", "-"."""
    some = learned(ended or cut)
    if not some:
        return "not learned" if ended else "-"
    if not ended:
        return f"{written(at(some, pairs))} cut"
    return written(at(some, pairs)) + (f" ({len(some)} of {len(ended)})" if len(some) < len(ended) else "")


def told_cut(rows: list[dict[str, Any]]) -> str:
    """How many models ran out of time, of all."""

    def models(some: Iterable[dict[str, Any]]) -> set[tuple[Any, ...]]:
        return {(named(row), method(row), row["rate"], row["seed"], row["steps"]) for row in some}

    begun, cut = models(rows), models(rows) - models(row for row in rows if row["finished"])
    return (
        f" {len(cut)} of {len(begun)} models ran out of time before their last step: marked as cut where they had learned something"
        " and no other seed trained to its end, else left out."
        if cut
        else ""
    )


def told_diverged(rows: list[dict[str, Any]]) -> str:
    """Which models ended in NaN."""
    told = "; ".join(f"{method(row)} at {named(row)}, seed {row['seed']}" for row in rows if row.get("diverged"))
    return f" Weights became NaN, counted as not learned: {told}." if told else ""


def named(row: dict[str, Any]) -> str:
    """ "512 tokens, d 128, 4 heads, noise": all that a model is compared within."""
    name = f"{row['length']} tokens, d {row['width']}" + (f", {row['heads']} heads" if row["heads"] > 1 else "")
    return (
        name + (", noise" if row["noise"] else "") + ("" if row["convolution"] else f", no convolution, {row['steps']} steps")
    )


def method(row: dict[str, Any]) -> str:
    """ "dma, w = n/8": the layer and the share of the keys that its rows keep."""
    part = row["length"] // row["keep"]
    return str(row["layer"]) if part == 1 else f"{row['layer']}, w = n/{part}"


def panels_of(best: dict[str, Found]) -> tuple[dict[str, Any], dict[str, float]]:
    """Curves of each shape and share of keys, and the w to be marked."""
    panels, marks = {}, {}
    for shape, found in best.items():
        for part in sorted({name.partition(", ")[2] for name in found} - {""}):
            name = f"{shape}, {part}"
            some = {layer: learned(seeds) for layer, seeds in found.items() if layer.partition(", ")[2] in ("", part)}
            pairs = pairs_of(found.values())
            panels[name] = {layer.partition(",")[0]: curve(seeds, pairs) for layer, seeds in some.items() if seeds}
            panels[name]["any value of the row"] = [(float(some), 1 / some, 0.0) for some in pairs]
            keep = int(shape.split()[0]) // int(part.partition("/")[2])
            if keep <= max(pairs):
                marks[name] = float(keep)
                panels[name]["w / pairs"] = [(float(some), min(1.0, keep / some), 0.0) for some in pairs]
    return panels, marks


def pairs_of(found: Iterable[Seeds]) -> list[int]:
    """All numbers of pairs."""
    return sorted({int(pairs) for seeds in found for accuracy in seeds.values() for pairs in accuracy})


def at(seeds: Seeds, pairs: int) -> list[float]:
    """Accuracy of each seed at this number of pairs."""
    return [accuracy[str(pairs)] for accuracy in seeds.values()]


def curve(seeds: Seeds, pairs: list[int]) -> list[tuple[float, float, float]]:
    """(pairs, mean, standard error over the seeds)."""
    return [(float(some), *mean_and_error(at(seeds, some))) for some in pairs]
