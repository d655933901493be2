"""Aligned items: documents, and questions about them, of equal numbers of tokens, so that they go through a model as batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from attnsieve.errors import require
from attnsieve.evaluation.tasks.longeval import lines_prefix
from attnsieve.evaluation.tasks.questions import Item, QuestionTask, longest_of
from attnsieve.evaluation.tasks.retrieval import QUERIES, key_value
from attnsieve.evaluation.tokens import Budget, shared_length

# How many documents are made for each one that is kept, and how many questions for each one that is asked.
DRAWS, ASKED_OF = 12, 8

# Tasks with many questions about a document, by name.
MANY: dict[str, Callable[[int], QuestionTask]] = {"kv": key_value, "longeval-lines-prefix": lines_prefix}


class Shape(NamedTuple):
    """Tokens of a document, of what follows it in each question, and of the longest answer."""

    document: int
    rests: list[int]
    answer: int


@dataclass(frozen=True)
class AlignedTask(QuestionTask):
    """A task whose items are, of a larger number made, those that agree most in their numbers of tokens.

    Items of one document length stand together. All questions are equally long; a document may have fewer of them.
    """

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Item]:
        """See `Task.items`; rows of this variant hold other items than those of the task itself."""
        build = lambda index, units: self._build(tokenizer, f"{self.name}/{length}/{seed}/aligned/{index}", units)  # noqa: E731
        budget = Budget(tokenizer, length)
        units = budget.most(
            lambda units: longest_of(tokenizer, lambda units: build(0, units), units), self.least, 2 * self.least
        )
        # Other draws may be a little longer than the one that fills the length.
        units = max(self.least, units - 1)
        shapes = [_shape(tokenizer, build(index, units)) for index in range(DRAWS * count)]
        fitting = {
            index: shape for index, shape in enumerate(shapes) if shape.document + max(shape.rests) + shape.answer <= length
        }
        require(
            bool(fitting),
            f"none of {len(shapes)} documents that {self.name} made for {length} tokens is as short as that: use a longer length",
        )
        rest = Counter(rest for shape in fitting.values() for rest in set(shape.rests)).most_common(1)[0][0]
        sizes = Counter(shape.document for shape in fitting.values() if rest in shape.rests)
        chosen = sorted(
            (index for index, shape in fitting.items() if rest in shape.rests),
            key=lambda index: (-sizes[shapes[index].document], shapes[index].document, index),
        )[:count]
        require(
            len(chosen) == count, f"{self.name} made only {len(chosen)} documents of {length} tokens, {count} were asked for"
        )
        return [_asked(build(index, units), shapes[index], rest) for index in chosen]


def aligned(task: QuestionTask) -> AlignedTask:
    """`task` with aligned items, named so in the variant; of tasks in `MANY` it asks eight questions about a document, spread
    over it (rows of the variant "aligned" alone are older: there the first eight that fit were asked)."""
    many = MANY[task.name](QUERIES * ASKED_OF) if task.name in MANY else task
    same = {field.name: getattr(many, field.name) for field in fields(many)}
    return AlignedTask(**same | {"variant": " ".join(part for part in (many.variant, "aligned spread") if part)})


def rests(item: Item) -> tuple[str, list[str]]:
    """The document, up to the last whole line that all questions share, and what follows it in each, without the answer."""
    texts = [query.prompt + query.gap for query in item.queries]
    document = texts[0].rfind("\n", 0, shared_length(texts)) + 1
    return texts[0][:document], [text[document:] for text in texts]


def _shape(tokenizer: Any, item: Item) -> Shape:
    """Counts of parts that are cut into tokens each by itself."""
    document, questions = rests(item)
    texts = [document, *questions, *(query.answers[0] for query in item.queries)]
    sizes = [len(ids) for ids in tokenizer(texts).input_ids]
    return Shape(sizes[0], sizes[1 : len(questions) + 1], max(sizes[len(questions) + 1 :]))


def _asked(item: Item, shape: Shape, rest: int) -> Item:
    queries = [query for query, own in zip(item.queries, shape.rests, strict=True) if own == rest]
    # Questions stand in the order of what they ask for: the first ones would all ask about the document's beginning.
    count = min(len(queries), QUERIES)
    return replace(item, queries=tuple(queries[(2 * k + 1) * len(queries) // (2 * count)] for k in range(count)))
