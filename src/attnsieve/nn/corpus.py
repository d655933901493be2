"""Training text as a stream of token blocks: text files, JSON lines or a `datasets` stream, read once and never held whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from attnsieve.errors import UserError, require
from attnsieve.files import is_text, utf8

_PIECE = 1 << 16  # characters given to the tokenizer at once
_SUFFIXES = (".txt", ".md", ".jsonl")


class TokenBlocks(IterableDataset[dict[str, Tensor]]):
    """Documents one after the other, an end-of-sequence token behind each, cut into blocks of `length` tokens.

    Yields {"input_ids", "labels"}: int64 [length], equal. What is left at the end of the text is dropped. Documents are
    (piece, last) pairs of `open_text`. Raises UserError when the text does not fill one block.
    """

    def __init__(self, pieces: Callable[[], Iterator[tuple[str, bool]]], tokenizer: Any, length: int) -> None:
        require(length > 1, f"a block needs at least 2 tokens, got length={length}")
        require(tokenizer.eos_token_id is not None, "the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
        self.pieces, self.tokenizer, self.length = pieces, tokenizer, length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        waiting: list[int] = []
        empty = True
        for piece, last in self.pieces():
            waiting += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            waiting += [self.tokenizer.eos_token_id] if last else []
            whole = len(waiting) - len(waiting) % self.length
            for first in range(0, whole, self.length):
                empty = False
                block = torch.tensor(waiting[first : first + self.length])
                yield {"input_ids": block, "labels": block.clone()}
            waiting = waiting[whole:]
        require(
            not empty,
            f"the text has {len(waiting)} tokens, fewer than one block of {self.length}: give more, or a shorter length",
        )


class Endless(IterableDataset[dict[str, Tensor]]):
    """The blocks of a text, which is read again when it ends.

    Trainer would begin a new epoch there instead: with a smaller batch before it, with gradients of batches that are too few to be
    accumulated, for ever where a text has no more of them; and it would resume at another place.
    """

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.blocks


def open_text(source: str | Path | Iterable[str]) -> Callable[[], Iterator[tuple[str, bool]]]:
    """A function that starts reading: pieces of text, and whether each ends its document.

    source: a .txt or .md file (one document), a .jsonl file (a document per line, under "text"), a folder of these, read
    in order of their names, "hub:NAME" or "hub:NAME:CONFIG" for the training split of a data set streamed by `datasets`,
    or any iterable of documents that can be read again. Raises UserError for anything else.
    """
    if not isinstance(source, str | Path):
        require(
            iter(source) is not source, "documents are read several times: give a list, or what begins anew when it is iterated"
        )
        return lambda: ((text, True) for text in source)
    if str(source).startswith("hub:"):
        return lambda: _hub(str(source)[4:])
    path = Path(source)
    require(path.exists(), f"no text at {str(path)!r}: give a file, a folder, or hub:NAME for a data set on the hub")
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.suffix in _SUFFIXES)
    require(bool(files), f"the folder {str(path)!r} holds no {', '.join(_SUFFIXES)} file")
    return lambda: (piece for file in files for piece in _pieces(file))


def beginning(pieces: Callable[[], Iterator[tuple[str, bool]]]) -> str:
    """16 hex digits over the first piece of a text: whether two runs read the same one."""
    first, _ = next(pieces(), ("", True))
    return sha256(first.encode(errors="surrogatepass")).hexdigest()[:16]


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    with path.open("rb") as raw, utf8(raw, path) as file:
        yield from _json_lines(file, path) if path.suffix == ".jsonl" else _text(file)


def _text(file: TextIO) -> Iterator[tuple[str, bool]]:
    """Whole lines, about 64K characters at a time, so that tokens seldom meet the edge of a piece."""
    lines = file.readlines(_PIECE)
    while lines:
        following = file.readlines(_PIECE)
        yield "".join(lines), not following
        lines = following


def _json_lines(file: TextIO, path: Path) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{path}:{number} is no JSON object with "text"') from error
        require(is_text(text), f'{path}:{number}: "text" must be text, got {text!r:.40}')
        yield text, True


def _hub(name: str) -> Iterator[tuple[str, bool]]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split="train", streaming=True)
    except Exception as error:  # the hub raises many kinds
        raise UserError(f"cannot stream the data set {repository!r}: {error}") from error
    for row in rows:
        require("text" in row, f'the data set {repository!r} has no column "text", but {sorted(row)}')
        yield row["text"], True
