"""LongEval's lines and topics (LongChat, 2023): the official prompts and scoring, and a variant with an answer prefix.

Prompts are those of the official generator. The published test cases differ from it: up to 680 lines they end in a space, and up to
25 topics they ask for "the first topic", not "topic(s)". Ours are drawn anew, as many lines or topics as fill the length, with the
tokenizer's chat template instead of one for each model, and answered greedily.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from attnsieve.errors import UserError, require
from attnsieve.evaluation.metrics import last_integer
from attnsieve.evaluation.tasks.questions import Generation, Item, Query, QuestionTask
from attnsieve.evaluation.tasks.records import content_digest
from attnsieve.evaluation.tasks.retrieval import QUERIES
from attnsieve.evaluation.words import ADJECTIVES, NOUNS, distinct_keys
from attnsieve.files import is_text, read_utf8

LINES_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
    "certain line index. Now the record start:\n\n"
)
LINES_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
LINES_PREFIX = " Line <{key}>: <REGISTER_CONTENT> is <"
TOPICS_HEADER = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am the USER. "
    "At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize each "
    "<TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start. "
)
TOPICS_QUESTION = (
    " Now the record ends. What is the first topic(s) we discussed? Only give me the topic name. Do not summarize yourself."
)
ASPECTS = ("history", "craft", "science", "cost", "future", "danger", "beauty", "origin", "meaning", "business")

# A topic and the conversation about it.
Conversation = tuple[str, str]


def lines() -> QuestionTask:
    """`longeval-lines`: chat template, up to 100 new tokens, right if the last integer is the line's number."""
    return QuestionTask(
        "longeval-lines", _one_line, forced=False, generation=Generation("accuracy", _last_integer_right, 100), chat=True
    )


def lines_prefix(queries: int = QUERIES) -> QuestionTask:
    """`longeval-lines-prefix`: not the official task. The same prompt without chat template, continued up to the number;
    eight lines of a document are asked for, teacher-forced."""
    return QuestionTask("longeval-lines-prefix", partial(_prefixed_lines, queries))


def topics(conversations: Path | None = None) -> QuestionTask:
    """`longeval-topics`: chat template, up to 50 new tokens, right if the answer names the first topic.

    conversations: LongEval's `conversations.jsonl` (topic, conversation), else dialogues made from templates. The official
    judge is another language model; here the topic's name must appear, articles and case aside.
    """
    official = None if conversations is None else _read_conversations(conversations)
    if official is None:
        build: Callable[[Random, int], Item] = lambda random, count: _topics([_made_up(random) for _ in range(count)])  # noqa: E731
    else:
        build = lambda random, count: _topics(_drawn(random, official, count))  # noqa: E731
    variant = "synthetic" if conversations is None else f"official {content_digest(conversations)}"
    generation = Generation("topic_match", _names_topic, 50)
    return QuestionTask("longeval-topics", build, forced=False, generation=generation, chat=True, least=1, variant=variant)


def _record(random: Random, count: int) -> tuple[list[str], list[str], str]:
    keys = distinct_keys(random, count)
    numbers = [str(random.randint(1, 50_000)) for _ in keys]
    body = "".join(f"line {key}: REGISTER_CONTENT is <{number}>\n" for key, number in zip(keys, numbers, strict=True))
    return keys, numbers, LINES_HEADER + body


def _one_line(random: Random, count: int) -> Item:
    keys, numbers, record = _record(random, count)
    place = random.randrange(count)
    query = Query(record + LINES_QUESTION.format(key=keys[place]), (numbers[place],))
    return Item((query,), {"lines": count, "asked": [place]})


def _prefixed_lines(queries: int, random: Random, count: int) -> Item:
    keys, numbers, record = _record(random, count)
    asked = sorted(random.sample(range(count), min(queries, count)))
    questions = (Query(record + (LINES_QUESTION + LINES_PREFIX).format(key=keys[place]), (numbers[place],)) for place in asked)
    return Item(tuple(questions), {"lines": count, "asked": asked})


def _last_integer_right(prediction: str, query: Query) -> float:
    return float(last_integer(prediction) == int(query.answers[0]))


def _topics(conversations: list[Conversation]) -> Item:
    record = TOPICS_HEADER.format(count=len(conversations)) + "".join(text for _, text in conversations)
    return Item((Query(record + TOPICS_QUESTION, (conversations[0][0],)),), {"topics": [topic for topic, _ in conversations]})


def _names_topic(prediction: str, query: Query) -> float:
    return float(_bare(query.answers[0]) in _bare(prediction))


def _bare(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _drawn(random: Random, official: list[Conversation], count: int) -> list[Conversation]:
    require(count <= len(official), f"the file has {len(official)} conversations, {count} fit the length: use a shorter one")
    return random.sample(official, count)


def _read_conversations(path: Path) -> list[Conversation]:
    require(path.is_file(), f"no file {path}; expected LongEval's conversations.jsonl")
    lines = read_utf8(path).split("\n")
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
        found = [(row["topic"], row["conversation"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of JSON lines with topic and conversation: {error!r:.100}") from None
    for number, (topic, conversation) in enumerate(found, 1):
        named = is_text(topic) and is_text(conversation) and bool(_bare(topic))
        require(
            named,
            f"{path}, conversation {number}: topic and conversation must be text, the topic with a word that is no article",
        )
    return found


def _made_up(random: Random) -> Conversation:
    thing, place = random.sample(NOUNS, 2)
    topic = f"the {random.choice(ASPECTS)} of {random.choice(ADJECTIVES)} {thing}s"
    turns = [
        f"USER: I would like to discuss the topic of {topic}. \n ASSISTANT: Sure, what would you like to know about it? \n"
    ]
    for _ in range(random.randint(2, 5)):
        mood, other = random.choice(ADJECTIVES), random.choice(NOUNS)
        turns.append(
            f" USER: Is it true that a {mood} {thing} needs a {other}? \n"
            f" ASSISTANT: Often, yes. People near the {place} have used a {other} for {random.randint(5, 300)} years, and "
            f"most of them would call the result {random.choice(ADJECTIVES)}. \n"
        )
    turns.append(f" USER: Great, this is the end of our discussion on {topic}. Let's talk about the next topic. ")
    return topic, "".join(turns)
