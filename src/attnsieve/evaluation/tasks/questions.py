"""Questions about a document: teacher-forced likelihood of the answer, free generation with an official metric, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from attnsieve.evaluation.scoring import AnswerScore, generate, score_documents
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.tokens import Budget, as_chat, encode, shared_length


@dataclass(frozen=True)
class Query:
    """One question: the whole text before the answer, the right answers (the first is the one that is teacher-forced), what
    stands between prompt and answer then (so that a space is not the model's to guess), and what else a metric needs."""

    prompt: str
    answers: tuple[str, ...]
    gap: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """Queries whose prompts share a document, and how the document was made."""

    queries: tuple[Query, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """Free generation: the metric's name, its score in 0 .. 1 for a prediction, and when to stop."""

    metric: str
    score: Callable[[str, Query], float]
    max_new_tokens: int
    stop: str | None = None


@dataclass(frozen=True, eq=False)
class Answered:
    """What a model made of an item: measures, and the logits before each token of its forced answers [tokens, vocabulary]."""

    measures: dict[str, float]
    logits: Tensor | None = None


@dataclass(frozen=True)
class QuestionTask(Task):
    """A task whose items are built from a number of units (lines, sentences) that fills the length.

    build: from a random generator and a number of units, one item. forced: measure teacher-forced `exact_match` and
    `answer_nll`. generation: measure free generation. chat: put the prompts into the tokenizer's chat template.
    """

    name: str
    build: Callable[[Random, int], Item]
    forced: bool = True
    generation: Generation | None = None
    chat: bool = False
    least: int = 2
    variant: str = ""

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Item]:
        """See `Task.items`."""
        budget = Budget(tokenizer, length - (self.generation.max_new_tokens if self.generation else 0))
        made, units = [], self.least
        for index in range(count):
            build = partial(self._build, tokenizer, f"{self.name}/{length}/{seed}/{index}")
            units = budget.most(partial(longest_of, tokenizer, build), self.least, units)
            made.append(build(units))
        return made

    def ids(self, tokenizer: Any, item: Item) -> list[int]:
        """See `Task.ids`: the first query's."""
        return encode(tokenizer, item.queries[0].prompt)

    def observe(self, model: Any, tokenizer: Any, item: Item) -> Answered:
        """See `Task.observe`."""
        return next(self.observe_all(model, tokenizer, [item]))

    def observe_all(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Answered]:
        """See `Task.observe_all`."""
        forced = forced_answers(model, tokenizer, items) if self.forced else (Answered({}) for _ in items)
        for item, seen in zip(items, forced, strict=True):
            written = {} if self.generation is None else generated_measures(model, tokenizer, item, self.generation)
            yield Answered(seen.measures | written, seen.logits)

    def measure(self, seen: Answered, dense: Answered) -> dict[str, float]:
        """See `Task.measure`; of forced answers also "answer_kl", KL(dense || plan) of the next-token distributions (nats)."""
        if seen.logits is None or dense.logits is None:
            return seen.measures
        own, other = (logits.float().log_softmax(-1) for logits in (seen.logits, dense.logits))
        return seen.measures | {"answer_kl": float((other.exp() * (other - own)).sum(-1).mean())}

    def _build(self, tokenizer: Any, key: str, units: int) -> Item:
        item = self.build(Random(key), units)
        if not self.chat:
            return item
        return replace(item, queries=tuple(replace(query, prompt=as_chat(tokenizer, query.prompt)) for query in item.queries))


def answered_ids(tokenizer: Any, item: Item, place: float) -> list[int]:
    """Ids of one question of an item, its document first and its answer last: of the question at `place` among them, 0 to 1."""
    query = item.queries[int(place * len(item.queries))]
    return encode(tokenizer, query.prompt + query.gap + query.answers[0])


def forced_answers(model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[Answered]:
    """Of every item, the means over its queries of the teacher-forced scores."""
    asked = ([(query.prompt + query.gap, query.answers[0]) for query in item.queries] for item in items)
    for scores in score_documents(model, tokenizer, asked):
        measures = {"exact_match": fmean(score.exact for score in scores), "answer_nll": fmean(score.nll for score in scores)}
        yield Answered(measures, _joined(scores))


def _joined(scores: Sequence[AnswerScore]) -> Tensor | None:
    logits = [score.logits for score in scores if score.logits is not None]
    return torch.cat(logits) if logits else None


def generated_measures(model: Any, tokenizer: Any, item: Item, generation: Generation) -> dict[str, float]:
    """Mean over the item's queries of the metric of what the model writes."""
    texts = [generate(model, tokenizer, query.prompt, generation.max_new_tokens, generation.stop) for query in item.queries]
    scores = [generation.score(text, query) for text, query in zip(texts, item.queries, strict=True)]
    return {generation.metric: fmean(scores)}


def longest_of(tokenizer: Any, build: Callable[[int], Item], units: int) -> str:
    """The text, answer included, of the query that needs most tokens."""
    texts = [query.prompt + query.gap + query.answers[0] for query in build(units).queries]
    # What all of them begin with is long and costs the same in each.
    shared = shared_length(texts)
    return max(texts, key=lambda text: len(encode(tokenizer, text[shared:])))
