"""Text files of every kind are read alike, and bytes of other encodings are refused by name."""

import io
import sys

import pytest

from attnsieve import UserError
from attnsieve.cli.run import read_prompt
from attnsieve.cli.train import read_config
from attnsieve.evaluation.rows import read_rows
from attnsieve.evaluation.tasks import make_task
from attnsieve.evaluation.tasks.records import read_records
from attnsieve.evaluation.text import text_source
from attnsieve.files import read_utf8, utf8
from attnsieve.nn.corpus import open_text


def test_marks_and_line_ends_do_not_matter_and_separators_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\none\xe2\x80\xa8two\rthree\n")
    assert read_utf8(path) == "café\none\u2028two\nthree\n"
    with path.open("rb") as raw, utf8(raw, path) as text:
        assert list(text) == ["café\n", "one\u2028two\n", "three\n"]


def test_what_is_read_stays_open_whatever_happens():
    for content in (b"one\ntwo\n", b"caf\xe9\n"):
        raw = io.BytesIO(content)
        try:
            with utf8(raw, "a") as text:
                text.readline()
        except UserError:
            assert content == b"caf\xe9\n"
        assert not raw.closed


READERS = {
    "prompt": lambda path: read_prompt(None, str(path)),
    "configuration": read_config,
    "training text": lambda path: list(open_text(path)()),
    "text": text_source,
    "rows": read_rows,
    "records": lambda path: read_records(path.parent, path.name, "a.zip"),
    "conversations": lambda path: make_task("longeval-topics", data=path),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_other_encodings_by_name(reader, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait\n" * 2)
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text: convert it first"):
        READERS[reader](path)


def test_a_prompt_from_stdin_is_read_as_from_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo")))
    assert read_prompt(None, "-") == "one\ntwo"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(UserError, match="stdin is not UTF-8 text"):
        read_prompt(None, "-")
