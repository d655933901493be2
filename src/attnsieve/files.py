"""Text files: UTF-8 with or without a byte order mark, lines ended in any way; lines added to them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, TextIO

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


def append_lines(path: Path, text: str) -> None:
    """Add whole lines to a file in one write, making folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # Editors may leave the last line without an end; rows glued to it would be lost with it.
        file.write(_line_end(file) + text.encode())


def _line_end(file: BinaryIO) -> bytes:
    """What is missing at the end of `file`: a line end, or nothing."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"
