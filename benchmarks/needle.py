"""Needles beyond the trained length: do the models of benchmarks/language.py copy what stood far back?

    python benchmarks/needle.py --models benchmarks/results/language --tokens runs/tokens --out benchmarks/results/needle.jsonl

A needle is a run of random tokens, put at a depth of a held-out text and begun again at its end: the model has to go on with it.
Beside it the same text without the needle (chance), and the loss on the text itself. Random tokens ask for nothing but copying
from afar, which small models learn; no natural question is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from experiment import (
    RESULTS,
    Budget,
    Rows,
    autocast,
    device_of,
    draw,
    mean_and_error,
    measure_and_report,
    publish,
    several,
    written,
)
from language import LAYERS
from language_report import latest
from language_text import read_tokens
from torch import Tensor
from tqdm.auto import tqdm

from attnsieve.errors import require
from attnsieve.nn import DmaForCausalLM

CUE, ANSWER = 8, 16  # tokens of the needle that are given again, and that are asked for
TEXT_POSITIONS = 256  # last tokens of the text whose loss is measured


def contexts(text: Tensor, length: int, depth: float, items: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids [2 * items, length]: texts with a needle, then the same without; and the answers [items, ANSWER]."""
    random = torch.Generator().manual_seed(seed)
    size = CUE + ANSWER
    body = length - 2 * size
    require(body > TEXT_POSITIONS, f"needles need more than {2 * size + TEXT_POSITIONS} tokens, got {length}")
    starts = torch.linspace(0, len(text) - body - 1, items).long().tolist()
    needles = torch.randint(vocabulary, (items, size), generator=random).to(text.device)
    others = torch.randint(vocabulary, (items, size), generator=random).to(text.device)
    place = int(depth * body)
    texts = torch.stack([text[first : first + body] for first in starts])
    rows = [torch.cat([texts[:, :place], hidden, texts[:, place:], needles], dim=1) for hidden in (needles, others)]
    return torch.cat(rows), needles[:, CUE:]


@torch.no_grad()
def measure(model: DmaForCausalLM, ids: Tensor, answers: Tensor) -> dict[str, Any]:
    """Share of exact answer tokens with its error, losses with and without the needle, and of the text's last tokens."""
    exact, losses, text = [], [], []
    for row, wanted in zip(ids, [*answers, *answers], strict=True):
        with autocast(ids.device):
            hidden = model.model(row[None], use_cache=False).last_hidden_state[0]
            answer = model.lm_head(hidden[-ANSWER - 1 : -1]).float()
            last = slice(-CUE - ANSWER - TEXT_POSITIONS, -CUE - ANSWER - 1)
            plain = model.lm_head(hidden[last]).float()
        losses.append(float(torch.nn.functional.cross_entropy(answer, wanted)))
        exact.append(float((answer.argmax(-1) == wanted).float().mean()))
        text.append(float(torch.nn.functional.cross_entropy(plain, row[last.start + 1 : last.stop + 1])))
    half = len(answers)
    value, error = mean_and_error(exact[:half])
    return {
        "exact": value,
        "stderr": error,
        "nll": mean_and_error(losses[:half])[0],
        "nll_without": mean_and_error(losses[half:])[0],
        "text_nll": mean_and_error(text)[0],
    }


def folders(path: Path) -> Iterator[tuple[str, int, Path]]:
    """(layer, seed, folder) of every model."""
    found = sorted(path.glob("*-*/config.json"))
    require(bool(found), f"no models in {path}: run python benchmarks/language.py train first")
    for config in found:
        layer, _, seed = config.parent.name.rpartition("-")
        yield layer, int(seed), config.parent


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """By length, mean over depths and seeds: exact answers, what the needle is worth, and the loss on the text."""
    cut = unfinished(path.with_name(path.name.replace("needle", "language")))
    rows = [row | {"saved": row["nll_without"] - row["nll"]} for row in rows if (row["layer"], row["seed"]) not in cut]
    layers = [layer for layer in LAYERS if any(row["layer"] == layer for row in rows)]
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})

    def of(name: str, layer: str, length: int, some: list[float] = depths) -> list[float]:
        return [row[name] for row in rows if (row["layer"], row["length"]) == (layer, length) and row["depth"] in some]

    def curves(name: str, depths_of: Callable[[int], list[float]]) -> dict[str, list[tuple[float, float, float]]]:
        found = {layer: {n: of(name, layer, n, depths_of(n)) for n in lengths} for layer in layers}
        return {layer: [(float(n), *mean_and_error(v)) for n, v in values.items() if v] for layer, values in found.items()}

    plain = lambda length: [depth for depth in depths if text_is_plain(length, depth)]  # noqa: E731
    body = [
        [
            layer,
            str(n),
            *(written(of(name, layer, n)) for name in ("exact", "saved")),
            written(of("text_nll", layer, n, plain(n))),
        ]
        for layer in layers
        for n in lengths
        if of("exact", layer, n)
    ]
    trained = rows[0]["trained_length"]
    notes = f"Trained at {trained} tokens. Mean and standard error over {len(depths)} depths, and seeds."
    notes += " Nats saved: by how much the needle lowers the loss of an answer token."
    told = ", ".join(f"{layer} seed {seed}" for layer, seed in sorted(cut))
    notes += f" Left out, not trained to the end: {told}." if cut else ""
    header = ["attention", "tokens", "answer tokens exact", "nats saved", "text, nats per token"]
    publish(path, "Needles beyond the trained length", header, body, notes)
    saved = {f"depth {depth:g}": curves("saved", lambda _, depth=depth: [depth]) for depth in depths}
    draw_beside(path, "answer", saved, "nats saved per answer token", trained)
    draw_beside(path, "text", {"text": curves("text_nll", plain)}, "nats per token", trained)


def draw_beside(path: Path, name: str, panels: dict[str, Any], y: str, trained: int) -> None:
    target = path.with_name(f"{path.stem}-{name}")
    draw(target, panels, "tokens (dashed: trained)", y, marks=dict.fromkeys(panels, float(trained)))


def text_is_plain(length: int, depth: float) -> bool:
    """Whether the needle lies before the tokens whose loss is that of the text."""
    size = CUE + ANSWER
    return int(depth * (length - 2 * size)) + size <= length - size - TEXT_POSITIONS


def unfinished(language: Path) -> set[tuple[str, int]]:
    """(layer, seed) of models that ran out of time, by the rows of benchmarks/language.py beside these: not to be compared."""
    return {(row["layer"], row["seed"]) for row in latest(Rows(language).all) if not row["finished"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=RESULTS / "language")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--lengths", type=several(int), default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--depths", type=several(float), default=[0.0, 0.25, 0.5, 0.75, 0.95])
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5, help="0: report only")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "needle.jsonl")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, rows: Rows) -> None:
    """Every model, length and depth that has no row yet."""
    budget, device = Budget(arguments.minutes), device_of(arguments.device)
    text = read_tokens(arguments.tokens, "held_out", device)
    for layer, seed, folder in folders(arguments.models):
        model = DmaForCausalLM.from_pretrained(folder).to(device).eval()
        common = {
            "layer": layer,
            "seed": seed,
            "trained_length": model.config.max_position_embeddings,
            "items": arguments.items,
        }
        cells = [(length, depth) for length in arguments.lengths for depth in arguments.depths]
        for length, depth in tqdm(cells, desc=layer, disable=None):
            key = {**common, "length": length, "depth": depth}
            if rows.find(key) is None and budget.left > 0:
                ids, answers = contexts(text, length, depth, arguments.items, model.config.vocab_size, seed=length)
                rows.add(key, measure(model, ids, answers), device)


def main() -> None:
    measure_and_report(parse(), measure_all, report)


if __name__ == "__main__":
    main()
