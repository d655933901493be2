"""Key-value retrieval and the passkey: short synthetic lookups with answers of single-token digits."""

from __future__ import annotations

from functools import partial
from random import Random

from attnsieve.evaluation.tasks.questions import Item, Query, QuestionTask
from attnsieve.evaluation.words import distinct_keys

QUERIES = 8
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the "
    "important information there."
)


def key_value(queries: int = QUERIES) -> QuestionTask:
    """`kv`: bare lines "adjective-noun: 12345", a blank line, and a key again. Eight keys of a document are asked for."""
    return QuestionTask("kv", partial(_key_value, queries))


def passkey() -> QuestionTask:
    """`passkey`: five digits at a random depth of a repeated sentence (after Mohtashami and Jaggi, arXiv 2305.16300; theirs has
    one to five digits, text cut at characters instead of whole lines, "memorize them", and the space after "is" left to the model)."""
    return QuestionTask("passkey", _passkey)


def _key_value(queries: int, random: Random, lines: int) -> Item:
    keys = distinct_keys(random, lines)
    values = [str(value) for value in random.sample(range(10_000, 100_000), lines)]
    document = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    asked = sorted(random.sample(range(lines), min(queries, lines)))
    questions = tuple(Query(f"{document}\n{keys[line]}: ", (values[line],)) for line in asked)
    return Item(questions, {"lines": lines, "asked": asked})


def _passkey(random: Random, sentences: int) -> Item:
    key = str(random.randint(10_000, 99_999))
    before = random.randint(0, sentences)
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    body = "\n".join([*[GRASS] * before, hidden, *[GRASS] * (sentences - before)])
    prompt = f"{PASSKEY_INTRODUCTION}\n{body}\nWhat is the pass key? The pass key is "
    return Item((Query(prompt, (key,)),), {"depth": before / sentences})
