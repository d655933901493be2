"""RULER's needles in a haystack (arXiv 2404.06654), its wording and metric, eight variants.

Differences from the official data: the words are ours and no key occurs twice; an essay starts at a random word, is cut into
sentences by their marks instead of by a trained model, and its needles stand at fortieths of it instead of at those rounded to
percents; the length is filled to the last word or line, the answer included. Prompts take no chat template (RULER's "base"). The
variants with a single answer are measured teacher-forced as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from uuid import UUID

from attnsieve.evaluation.metrics import string_match_all
from attnsieve.evaluation.tasks.questions import Generation, Item, Query, QuestionTask
from attnsieve.evaluation.tasks.retrieval import GRASS
from attnsieve.evaluation.text import TextSource
from attnsieve.evaluation.words import distinct_keys

NEW_TOKENS = 128
CHARACTERS_PER_WORD = 12
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
PROMPT_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Needles:
    """A variant: what the haystack is made of, kinds of keys and values, keys hidden, values per key, keys asked for."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


VARIANTS = {
    "needle-single-1": Needles("noise"),
    "needle-single-2": Needles("essay"),
    "needle-single-3": Needles("essay", value_kind="uuids"),
    "needle-multikey-1": Needles("essay", keys=4),
    "needle-multikey-2": Needles("needle"),
    "needle-multikey-3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "needle-multivalue": Needles("essay", values=4),
    "needle-multiquery": Needles("essay", keys=4, asked=4),
}


def needle_task(name: str, essay: TextSource) -> QuestionTask:
    """The variant `name`. `essay` is read for the variants whose haystack is an essay, and named in their rows."""
    needles = VARIANTS[name]
    # Reading by powers of two lets all items of a length share one reading.
    words = cache(lambda power: essay.read(CHARACTERS_PER_WORD << power).split())
    build = lambda random, units: _item(needles, words, random, units)  # noqa: E731
    # With several answers there is no one text to force.
    one = needles.values * needles.asked == 1
    generation = Generation("string_match", lambda text, query: string_match_all(text, query.answers), NEW_TOKENS)
    variant = essay.name if needles.haystack == "essay" else ""
    return QuestionTask(name, build, forced=one, generation=generation, least=needles.keys * needles.values, variant=variant)


def _item(needles: Needles, words: Callable[[int], list[str]], random: Random, units: int) -> Item:
    keys = _some(random, needles.key_kind, needles.keys)
    hidden = {key: _some(random, needles.value_kind, needles.values) for key in keys}
    kind = needles.value_kind
    sentences = [NEEDLE.format(kind=kind, key=key, value=value) for key in keys for value in hidden[key]]
    random.shuffle(sentences)
    if needles.haystack == "essay":
        context = _in_essay(random, words(units.bit_length()), units, sentences)
    else:
        context = _in_lines(random, needles, units, sentences, keys)
    asked = random.sample(keys, needles.asked)
    answers = tuple(value for key in asked for value in hidden[key])
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    template, kind = (PROMPT_ONE, kind[:-1]) if len(answers) == 1 else (PROMPT, kind)
    prompt = template.format(kind=kind, context=context, query=query)
    return Item((Query(prompt, answers, gap=" "),))


def _in_essay(random: Random, words: list[str], units: int, needles: list[str]) -> str:
    """`units` words of the essay, from a random place on and around its end, with the needles between sentences."""
    start = random.randrange(len(words))
    text = " ".join(words[(start + place) % len(words)] for place in range(units))
    sentences = re.split(r"(?<=[.!?]) ", text)
    places = sorted(random.sample(range(40), len(needles)), reverse=True)
    for place, sentence in zip(places, needles, strict=True):
        sentences.insert(round(len(sentences) * place / 39), sentence)
    return " ".join(sentences)


def _in_lines(random: Random, needles: Needles, units: int, hidden: list[str], hidden_keys: list[str]) -> str:
    """`units` lines of the noise sentence, or of needles that nobody asks for, with the hidden ones among them."""
    lines = [GRASS] * units
    if needles.haystack == "needle":
        others = zip(*(_some(random, kind, units) for kind in (needles.key_kind, needles.value_kind)), strict=True)
        # A second needle with a hidden key would be a second right answer.
        fair = ((key, value) for key, value in others if key not in hidden_keys)
        lines = [NEEDLE.format(kind=needles.value_kind, key=key, value=value) for key, value in fair]
    for place, line in zip(sorted(random.sample(range(units), len(hidden)), reverse=True), hidden, strict=True):
        lines.insert(place, line)
    return "\n".join(lines)


def _some(random: Random, kind: str, count: int) -> list[str]:
    if kind == "words":
        return distinct_keys(random, count)
    if kind == "numbers":
        return [str(random.randint(10**6, 10**7 - 1)) for _ in range(count)]
    return [str(UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]
