"""Text files: UTF-8 with or without a byte order mark, lines ended in any way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from attnsieve.errors import UserError


@contextmanager
def utf8(raw: IO[bytes], name: str | Path) -> Iterator[TextIO]:
    """`raw` as text whose lines end in "\\n"; it stays open. Raises UserError that tells `name` for bytes that are not UTF-8."""
    text = io.TextIOWrapper(raw, encoding="utf-8-sig")
    try:
        yield text
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text: convert it first") from None
    finally:
        text.detach()


def read_utf8(path: Path) -> str:
    """All of a text file, read as by `utf8`. Raises OSError for files that cannot be read."""
    with path.open("rb") as raw, utf8(raw, path) as text:
        return text.read()


def is_text(value: object) -> bool:
    """Whether a value read from JSON is text that has bytes: escapes can spell halves of letters (lone surrogates), which no
    tokenizer takes."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
