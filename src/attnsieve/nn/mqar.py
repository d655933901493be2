"""Multi-query associative recall (Zoology, Arora et al., arXiv 2312.04927): key-value pairs, then their keys again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.errors import require

IGNORED = -100
_ROWS = 1024  # examples drawn at once, to bound memory


@dataclass(frozen=True)
class RecallTask:
    """`pairs` distinct keys, each followed by its value, then every key once more; after it the model must name the value.

    Keys are tokens 1 .. vocabulary / 2 - 1, values the upper half. The gaps between the pairs and their queries follow
    Zoology's power law p(gap) ~ gap^(power - 1), without replacement, in steps of two tokens. All other tokens are random,
    which makes pairs that nobody asks for, or 0 without `noise`.

    Raises UserError unless 4 * pairs <= length (so that the queries have room), the length is even, and the vocabulary
    holds enough distinct keys and values.
    """

    length: int
    pairs: int
    vocabulary: int = 8192
    power: float = 0.01
    noise: bool = True

    def __post_init__(self) -> None:
        require(
            0 < 4 * self.pairs <= self.length,
            f"{self.pairs} pairs need a length of at least {4 * self.pairs} tokens, got {self.length}",
        )
        require(self.length % 2 == 0, f"length must be even, got {self.length}")
        require(
            self.vocabulary // 2 > self.pairs and self.vocabulary > self.length,
            f"a vocabulary of {self.vocabulary} is too small for {self.pairs} pairs at length {self.length}",
        )

    def sample(self, examples: int, random: int | torch.Generator, levels: int = 1) -> tuple[Tensor, Tensor]:
        """input_ids, labels, int64 [examples, length]; labels are the values where they are asked for, else -100.

        As in transformers, the logits at t are scored with labels[t + 1]. random: a seed, or a generator, on whose device
        the examples are made, without waiting for it. levels: of every `levels` rows one has all pairs, the next one half of
        them, then a quarter and so on, with questions as near as if it were a task of its own. Models learn from near questions
        first.
        """
        if isinstance(random, int):
            random = torch.Generator().manual_seed(random)
        half, device = self.vocabulary // 2, random.device
        count = (self.pairs >> (torch.arange(examples, device=device) % levels)).clamp_min(1)[:, None]
        slot = torch.arange(self.pairs, device=device).expand(examples, -1)
        real = slot < count
        keys = 1 + _distinct(torch.ones(examples, half - 1, device=device), self.pairs, random)
        values = half + _distinct(torch.ones(examples, self.vocabulary - half, device=device), self.pairs, random)
        asked = torch.where(real, 2 * count + 2 * _distinct(self._gaps(count), self.pairs, random), 0)
        ids = torch.randint(self.vocabulary if self.noise else 1, (examples, self.length), generator=random, device=device)
        for place, tokens in ((2 * slot, keys), (2 * slot + 1, values), (asked, keys)):
            ids.scatter_(1, place, torch.where(real, tokens, ids.gather(1, place)))
        labels = torch.full_like(ids, IGNORED).scatter_(1, asked + 1, torch.where(real, values, IGNORED))
        return ids, labels

    def _gaps(self, count: Tensor) -> Tensor:
        """float32 [examples, steps of two tokens]: weights of the gaps between a row's pairs, `count` [examples, 1], and its
        queries; 0 where there is no room."""
        steps = torch.arange(self.length // 2 - 1, device=count.device)
        law = (steps + 1.0) ** (self.power - 1)
        return law.masked_fill(steps >= self.length // 2 - count, 0.0)


def _distinct(weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """int64 [rows, count]: indices drawn without replacement, each next one in proportion to the weights [rows, m] left."""
    # The Gumbel trick: the order of log weights plus Gumbel noise is that of drawing one after the other.
    parts = []
    for some in weights.split(_ROWS):
        uniform = torch.rand(some.shape, generator=random, device=random.device)
        parts.append((some.log() - (-uniform.log()).log()).topk(count, dim=1).indices)
    return torch.cat(parts)
