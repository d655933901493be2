"""Texts to calibrate on: a task's document with many of its questions and answers behind it, so that retrieval is much of the text."""

from __future__ import annotations

from random import Random
from typing import Any

from attnsieve.errors import require
from attnsieve.evaluation.tasks.aligned import MANY, rests
from attnsieve.evaluation.tokens import encode

# A share of the text, and a number, that questions do not exceed.
QUESTIONS_SHARE, MOST_QUESTIONS = 0.25, 128


def rehearsal(tokenizer: Any, name: str, length: int, seed: int) -> list[int]:
    """Exactly `length` token ids: a document of the task `name` ("kv", "longeval-lines-prefix") and questions with their answers.

    A document alone hardly uses the heads that retrieve, nor does one with a single question, in the mean over its rows.

    Raises UserError for tasks that ask too little about a document, and for lengths that are too short.
    """
    require(name in MANY, f"{name!r} has no questions to rehearse; expected one of {', '.join(MANY)}")
    task, random = MANY[name](MOST_QUESTIONS), Random(f"rehearsal/{seed}")
    room = int(length * (1 - QUESTIONS_SHARE))
    while True:
        (item,) = task.items(tokenizer, room, 1, seed)
        document, questions = rests(item)
        body = document.rstrip("\n")
        answered = [
            document[len(body) :] + question + query.answers[0] for question, query in zip(questions, item.queries, strict=True)
        ]
        ids = encode(tokenizer, body + "".join(random.sample(answered, len(answered))))
        if len(ids) >= length:
            return ids[:length]
        # Few questions: a longer document makes up for them, and the last question is cut.
        room += max(length - len(ids), length // 16)
