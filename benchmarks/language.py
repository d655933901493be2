"""Language models that differ in attention only: equal parameters, equal tokens, held-out loss by position.

    python benchmarks/language.py prepare --tokens runs/tokens              # where the text is; then carry the folder
    python benchmarks/language.py train --tokens runs/tokens --minutes 8 --out benchmarks/results/language.jsonl

The text is that of language_text.py. Steps are chosen so that all layers fit into the minutes, from the time that a few steps of
each take, or are given. Models are kept in a folder, beside the rows unless told otherwise, for benchmarks/needle.py. Processes,
one per GPU, can share the layers and write to one file: give them the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from experiment import (
    RESULTS,
    Budget,
    Rows,
    Training,
    autocast,
    device_of,
    mean_and_error,
    measure_and_report,
    peak_bytes,
)
from language_report import LOOKS, report
from language_text import SOURCES, prepare, read_tokens
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from attnsieve.errors import require
from attnsieve.nn import DmaConfig, DmaForCausalLM

LAYERS = ("mha", "dma", "dma-window", "gqa", "swa", "nsa", "mla", "mqa", "dma-all", "swa-quarter")
PROBE_STEPS = 6


def configuration(layer: str, arguments: argparse.Namespace, vocabulary: int) -> DmaConfig:
    """A configuration whose MLP is as wide as it takes to have the parameters of the "mha" model."""
    wanted = parameters(raw_configuration("mha", arguments, vocabulary, arguments.intermediate))
    per_channel = 3 * arguments.hidden * arguments.depth
    without = parameters(raw_configuration(layer, arguments, vocabulary, 8)) - 8 * per_channel
    return raw_configuration(layer, arguments, vocabulary, max(8, 8 * round((wanted - without) / per_channel / 8)))


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
                numbers["text"] = json.loads((arguments.tokens / SOURCES).read_text(encoding="utf-8"))
                if "diverged" in numbers:
                    rows.add(key, numbers, device)
                    print(f"{layer:10} seed {seed}: diverged after {len(numbers['curve'])} looks at its loss", flush=True)
                    continue
                losses = held_out_losses(language.model, held_out, arguments.length, arguments.windows)
                row = rows.add(key, numbers | measured(losses), device)
                models = arguments.models or arguments.out.with_suffix("")
                language.model.save_pretrained(models / f"{layer}-{seed}")
                print(f"{layer:10} seed {seed}: {row['nll']:.4f} nats, {row['seconds']} s", flush=True)


def run(language: Language, layer: str, budget: Budget) -> dict[str, Any]:
    """Train to the end, or until the budget is spent: then not `finished`. A model with NaN is done, and `diverged`."""
    training, device = language.training, language.text.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, curve = time.monotonic(), []
    with tqdm(total=training.steps, desc=layer, unit="step", leave=False, disable=None) as bar:
        while training.done < training.steps:
            training.step()
            bar.update()
            if training.done % max(1, training.steps // LOOKS) == 0:
                training.look()
                loss = training.read(training.last)
                if not math.isfinite(loss):
                    break
                curve.append(round(loss, 4))
                if budget.left < 0:
                    break
    training.read(training.last)  # the device may be steps behind
    seconds = time.monotonic() - start
    config, model = language.model.config, language.model
    numbers = {"parameters": sum(p.numel() for p in model.parameters()), "intermediate": config.intermediate_size}
    diverged = training.diverged
    numbers |= {"finished": training.done == training.steps or diverged, "curve": curve}
    numbers |= {"trained_tokens": training.done * language.batch * language.length}
    numbers |= {"seconds": round(seconds, 2), "peak_bytes": peak_bytes(device), "cuda_graph": training.graph is not None}
    numbers |= training.health.told(diverged=diverged)
    if not diverged and config.attention == "dma":
        numbers["A"] = [[round(a, 4) for a in layer.self_attn.A.tolist()] for layer in model.model.layers]
    return numbers


def measured(losses: Tensor) -> dict[str, Any]:
    """Mean held-out loss with its error over stretches, and by position."""
    value, error = mean_and_error(losses.mean(1).tolist())
    edges = [0, *(2**k for k in range(6, losses.shape[1].bit_length())), losses.shape[1]]
    spans = [(a, b) for a, b in pairwise(edges) if a < b]
    return {"nll": value, "stderr": error, "by_position": {str(b): float(losses[:, a:b].mean()) for a, b in spans}}


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
        prepare(arguments.tokens, arguments.characters, arguments.vocabulary)
        return
    measure_and_report(arguments, train, report)


if __name__ == "__main__":
    main()
