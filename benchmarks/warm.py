"""Compile the kernels that `accuracy.txt` needs on random weights, into the cache on disk that all processes share.

    python benchmarks/fleet.py --gpus 2 --each 8 --seconds 100 -- python benchmarks/warm.py --seconds 80 --shard {shard}

Models have the attention of Qwen2.5-0.5B and SmolLM2-135M, documents the numbers of tokens of the scored ones: integers that a kernel
is given decide, by what divides them, which variant is compiled. So this can run before the models are there.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from claims import add_sharing_options
from pareto import plans_with_rails
from pareto_plans import GROUPS, Workshop
from transformers import LlamaConfig, LlamaForCausalLM

import attnsieve
from attnsieve import Plan
from attnsieve.evaluation import layer_fidelity
from attnsieve.evaluation.scoring import score_documents
from attnsieve.fitting import default_candidates
from attnsieve.hf import fingerprint, measure

LAYERS, VOCABULARY, QUESTIONS = 2, 256, 8
# Hidden size, query heads, KV heads.
QWEN, SMOLLM2 = (896, 14, 2), (576, 9, 3)
RULES = (
    "keys-0.9", "keys-by", "minference-0.9", "xattention-0.9", "flashprefill-0.1", "streaming-llm-0.25", "window-0.25",
    "longformer-0.25", "bigbird-0.25", "h2o-0.3", "snapkv-0.3",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Documents of so many tokens, and tokens of each question and answer about them; as aligned items have them."""

    shape: tuple[int, int, int]
    length: int
    documents: int
    tokens: int
    question: int
    answer: int


BATCHES = (
    Batch(QWEN, 2048, 32, 2015, 5, 5),
    Batch(QWEN, 4096, 16, 4070, 5, 5),
    Batch(QWEN, 8192, 8, 8174, 5, 5),
    Batch(QWEN, 2048, 32, 2006, 21, 5),
    Batch(QWEN, 4096, 16, 4038, 21, 5),
    Batch(QWEN, 8192, 8, 8156, 21, 4),
    Batch(SMOLLM2, 1024, 32, 982, 6, 5),
    Batch(SMOLLM2, 2048, 31, 2006, 5, 5),
    Batch(SMOLLM2, 4096, 16, 4070, 5, 5),
    Batch(SMOLLM2, 8192, 8, 8164, 5, 5),
    Batch(SMOLLM2, 4096, 16, 4021, 26, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sharing_options(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths and documents by this: to try it on a CPU")
    arguments = parser.parse_args()
    (number, count), stop = arguments.shard, time.monotonic() + arguments.seconds
    pieces = [piece for batch in BATCHES for piece in pieces_of(smaller(batch, arguments.shrink), arguments.device)]
    for name, run in pieces[number::count]:
        if time.monotonic() < stop:
            start = time.monotonic()
            run()
            print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


def smaller(batch: Batch, factor: int) -> Batch:
    return Batch(
        batch.shape, batch.length // factor, -(-batch.documents // factor), batch.tokens // factor, batch.question, batch.answer
    )


def pieces_of(batch: Batch, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What to run for one batch, by name: every rule, and candidates as they are measured, eight of 64 queries and all choosing."""
    model = random_model(batch.shape, device)
    for name, plan in plans_for(model, batch.length).items():
        yield f"{batch} {name}", partial(score, model, plan, batch)
    text = Random(0).choices(range(VOCABULARY), k=batch.length)
    for name, rules in candidates(batch.length).items():
        yield f"{batch} measure {name}", partial(measure, model, [text], rules, progress=False)


def random_model(shape: tuple[int, int, int], device: str) -> Any:
    hidden, heads, kv_heads = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 15,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(device, dtype).eval()


def candidates(length: int) -> dict[str, list[Any]]:
    return {"usual": default_candidates(length), "all": default_candidates(length, rows=64)}


def plans_for(model: Any, length: int) -> dict[str, Plan]:
    """The same rule in every head, and candidates mixed as budgets mix them; each also with rails."""
    mark = fingerprint(model)
    workshop = Workshop(model, None, (), "", 0, Path())
    made = {
        name: plan
        for group in ("chosen", "phases", "fixed", "caches")
        for name, plan in GROUPS[group](workshop, length).items()
    }
    plans = {name: plan for name, plan in made.items() if name.startswith(RULES)}
    for name, rules in candidates(length).items():
        cells = [
            [rules[(layer * mark.heads + head) % len(rules)] for head in range(mark.heads)] for layer in range(mark.layers)
        ]
        plans[f"mixed-{name}-0"] = Plan(mark, tuple(map(tuple, cells)))
    return plans_with_rails(plans, ("mixed", "minference", "keys-0.9", "streaming"))


def score(model: Any, plan: Plan, batch: Batch) -> None:
    random = Random(0)
    write = lambda tokens: "".join(random.choices("abcdefgh", k=tokens))  # noqa: E731
    documents = []
    for _ in range(batch.documents):
        text = write(batch.tokens)
        documents.append([(text + "ABCDEFGH"[n] + write(batch.question - 1), write(batch.answer)) for n in range(QUESTIONS)])
    with attnsieve.apply(model, plan):
        list(score_documents(model, Letters(), documents))
    layer_fidelity(model, plan, Letters()(documents[0][0][0]).input_ids)


class Letters:
    """A tokenizer that makes a token of every letter."""

    bos_token, bos_token_id = None, None

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


if __name__ == "__main__":
    main()
