"""Tasks on plain text: perplexity by position, and fidelity of the next-token distribution to dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnsieve.evaluation.fidelity import layer_fidelity
from attnsieve.evaluation.scoring import log_probs_at, spread
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.text import TextSource, token_windows
from attnsieve.plan import Plan

# The logits of all positions of a long text would not fit; evenly spread ones give the same means.
PERPLEXITY_POSITIONS = 2048
FIDELITY_POSITIONS = 256
FIRST_BUCKET = 256


class TextTask(Task):
    """Items are stretches of a text, as token ids."""

    text: TextSource

    @property
    def variant(self) -> str:  # type: ignore[override]
        """The text's name."""
        return self.text.name

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[list[int]]:
        """See `Task.items`."""
        return token_windows(self.text, tokenizer, length, count, seed)

    def ids(self, tokenizer: Any, item: list[int]) -> list[int]:
        """See `Task.ids`."""
        return item


@dataclass(frozen=True)
class Perplexity(TextTask):
    """`perplexity`: mean negative log-likelihood (nats) of a text's tokens: "nll", and by position "nll 0-256", "nll 256-512",
    "nll 512-1024" and so on. At most 2048 positions, evenly spread, are scored. exp(nll) is the perplexity."""

    text: TextSource
    name: str = "perplexity"

    def observe(self, model: Any, tokenizer: Any, item: list[int]) -> dict[str, float]:
        """See `Task.observe`."""
        positions = spread(len(item) - 1, PERPLEXITY_POSITIONS)
        log_probs = log_probs_at(model, item, positions)
        following = torch.tensor(item, device=log_probs.device)[positions.to(log_probs.device) + 1]
        nll = -log_probs.gather(1, following[:, None])[:, 0].cpu()
        measures = {"nll": float(nll.mean())}
        for first, last in buckets(len(item)):
            inside = nll[(positions + 1 >= first) & (positions + 1 < last)]
            if len(inside):
                measures[f"nll {first}-{last}"] = float(inside.mean())
        return measures


@dataclass(frozen=True)
class Fidelity(TextTask):
    """`fidelity`: how close a plan stays to dense attention on a text.

    At 256 positions: "kl", KL(dense || sparse) of the next-token distribution in nats, and "top1_agreement", the share with the
    same most likely token. On the dense model's activations, means over all heads: "retained_mass" and "output_error"
    (`attnsieve.evaluation.layer_fidelity` gives them per layer and head).
    """

    text: TextSource
    name: str = "fidelity"

    def observe(self, model: Any, tokenizer: Any, item: list[int]) -> Tensor:
        """See `Task.observe`: log-probabilities [positions, vocabulary] on the CPU."""
        return log_probs_at(model, item, spread(len(item), FIDELITY_POSITIONS)).cpu()

    def measure(self, seen: Tensor, dense: Tensor) -> dict[str, float]:
        """See `Task.measure`."""
        kl = (dense.exp() * (dense - seen)).sum(-1).mean()
        agreement = (seen.argmax(-1) == dense.argmax(-1)).float().mean()
        return {"kl": float(kl), "top1_agreement": float(agreement)}

    def inspect(self, model: Any, plan: Plan | None, item: list[int]) -> dict[str, float]:
        """See `Task.inspect`."""
        if plan is None:
            return {"retained_mass": 1.0, "output_error": 0.0}
        found = layer_fidelity(model, plan, item)
        return {"retained_mass": float(found.retained.mean()), "output_error": float(found.error.mean())}


def buckets(length: int) -> list[tuple[int, int]]:
    """Position ranges 0-256, 256-512, 512-1024 ..., the last one cut at `length`."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(first, min(last, length)) for first, last in pairwise(edges) if first < length]
