"""Questions about a document: teacher-forced likelihood of the answer, free generation with an official metric, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from statistics import fmean
from typing import Any

from attnsieve.evaluation.scoring import generate, score_answers
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
            units = budget.most(partial(_longest_of, tokenizer, build), self.least, units)
            made.append(build(units))
        return made

    def ids(self, tokenizer: Any, item: Item) -> list[int]:
        """See `Task.ids`: the first query's."""
        return encode(tokenizer, item.queries[0].prompt)

    def observe(self, model: Any, tokenizer: Any, item: Item) -> dict[str, float]:
        """See `Task.observe`."""
        measures = forced_measures(model, tokenizer, item) if self.forced else {}
        if self.generation is not None:
            measures |= generated_measures(model, tokenizer, item, self.generation)
        return measures

    def _build(self, tokenizer: Any, key: str, units: int) -> Item:
        item = self.build(Random(key), units)
        if not self.chat:
            return item
        return replace(item, queries=tuple(replace(query, prompt=as_chat(tokenizer, query.prompt)) for query in item.queries))


def forced_measures(model: Any, tokenizer: Any, item: Item) -> dict[str, float]:
    """Means over the item's queries of the teacher-forced scores."""
    scores = score_answers(model, tokenizer, [(query.prompt + query.gap, query.answers[0]) for query in item.queries])
    return {"exact_match": fmean(score.exact for score in scores), "answer_nll": fmean(score.nll for score in scores)}


def generated_measures(model: Any, tokenizer: Any, item: Item, generation: Generation) -> dict[str, float]:
    """Mean over the item's queries of the metric of what the model writes."""
    texts = [generate(model, tokenizer, query.prompt, generation.max_new_tokens, generation.stop) for query in item.queries]
    scores = [generation.score(text, query) for text, query in zip(texts, item.queries, strict=True)]
    return {generation.metric: fmean(scores)}


def _longest_of(tokenizer: Any, build: Callable[[int], Item], units: int) -> str:
    """The text, answer included, of the query that needs most tokens."""
    texts = [query.prompt + query.gap + query.answers[0] for query in build(units).queries]
    # What all of them begin with is long and costs the same in each.
    shared = shared_length(texts)
    return max(texts, key=lambda text: len(encode(tokenizer, text[shared:])))
