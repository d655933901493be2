"""Benchmarks that are files of records: JSON lines from a folder or the hub, a prompt template, greedy answers, a metric."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

from attnsieve.errors import UserError, require
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.tasks.questions import Generation, Item, Query, generated_measures
from attnsieve.evaluation.tokens import as_chat, cut_middle, encode
from attnsieve.files import is_text, utf8

FIELDS = ("input", "context", "answers")


@dataclass(frozen=True)
class RecordTask(Task):
    """Records whose prompt loses its middle beyond the length, as their benchmark does it.

    records: called once, when items are asked for. template: a format string over the record's fields. query: the answers
    and what else the metric needs. variant: the file, see `content_digest`. Items are drawn from the records by the seed.
    """

    name: str
    records: Callable[[], list[dict[str, Any]]]
    template: str
    query: Callable[[str, Mapping[str, Any]], Query]
    generation: Generation
    chat: bool = True
    variant: str = ""

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Sequence[Item]:
        """See `Task.items`; `length` bounds the prompt before the chat template, as in the benchmarks."""
        require(length > 1, f"{self.name} cuts prompts to {length} tokens, of which nothing is left: use a longer length")
        records = self.records()
        require(count <= len(records), f"{self.name} has {len(records)} records, {count} were asked for: ask for fewer items")
        chosen = Random(f"{self.name}/{seed}").sample(records, count)
        return [self._item(tokenizer, length, record) for record in chosen]

    def ids(self, tokenizer: Any, item: Item) -> list[int]:
        """See `Task.ids`."""
        return encode(tokenizer, item.queries[0].prompt)

    def tokens(self, tokenizer: Any, item: Item) -> int:
        """See `Task.tokens`: the chat template and the answer come on top of the length."""
        return super().tokens(tokenizer, item) + self.generation.max_new_tokens

    def observe(self, model: Any, tokenizer: Any, item: Item) -> dict[str, float]:
        """See `Task.observe`."""
        return generated_measures(model, tokenizer, item, self.generation)

    def _item(self, tokenizer: Any, length: int, record: Mapping[str, Any]) -> Item:
        prompt = cut_middle(tokenizer, self.template.format_map(record), length)
        return Item((self.query(as_chat(tokenizer, prompt) if self.chat else prompt, record),))


def content_digest(path: Path) -> str:
    """8 hex digits of a file's sha256, which tell rows of different files apart; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def read_records(source: str | Path, file: str, archive: str) -> list[dict[str, Any]]:
    """The records of JSON-lines file `file` in the folder `source`, or in the zip `archive` of the hub data set `source`.

    Raises UserError for a missing file, a data set that cannot be reached and records without input, context and answers.
    """
    folder = Path(source)
    require(not folder.is_file(), f"{folder} is a file: give the folder that holds {file}")
    if folder.is_dir():
        path = folder / file
        require(path.is_file(), f"no file {path}; expected the benchmark's JSON lines under that name")
        with path.open("rb") as raw:
            return _parsed(raw, str(path))
    with zipfile.ZipFile(_download(str(source), archive)) as zipped:
        names = [name for name in zipped.namelist() if Path(name).name == file]
        require(bool(names), f"{archive} of {source} holds no {file}")
        with zipped.open(names[0]) as raw:
            return _parsed(raw, file)


def _download(repository: str, archive: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, archive, repo_type="dataset")
    except (OSError, ValueError) as error:  # the hub's errors, network included, derive from these
        raise UserError(
            f"{repository!r} is neither a folder nor a hub data set that can be reached ({type(error).__name__}): download "
            f"{archive} from it, unpack it, and give the folder"
        ) from None


def _parsed(raw: IO[bytes], name: str) -> list[dict[str, Any]]:
    with utf8(raw, name) as lines:
        return [_record(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    good = isinstance(record, dict) and all(key in record for key in FIELDS) and isinstance(record["answers"], list)
    require(good and bool(record["answers"]), f"{where}: expected the fields {', '.join(FIELDS)}")
    require(all(is_text(record[key]) for key in ("input", "context")), f"{where}: input and context must be text")
    answers = all(is_text(answer) or type(answer) in (int, float) for answer in record["answers"])
    require(answers, f"{where}: answers must be a list of texts or numbers")
    keywords, classes = record.get("answer_keywords"), record.get("all_classes")
    require(keywords is None or is_text(keywords), f"{where}: answer_keywords must be text or null")
    named = classes is None or (isinstance(classes, list) and all(map(is_text, classes)))
    require(named, f"{where}: all_classes must be a list of texts or null")
    return dict(record)
