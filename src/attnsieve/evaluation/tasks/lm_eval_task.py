"""Tasks of lm-eval (optional extra "eval"): RULER, InfiniteBench, LongBench and whatever else it has or is given."""

from __future__ import annotations

import hashlib
import io
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnsieve.errors import UserError, require
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.tasks.records import content_digest
from attnsieve.evaluation.tokens import encode
from attnsieve.hf import longest_text

# What lm-eval calls the number of tokens to write, and how many they are without it.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256


class Document(NamedTuple):
    """One document of an lm-eval task: the length the task was built for, and its place in the task."""

    length: int
    place: int


class LmEvalTask(Task):
    """One lm-eval task, document by document, with the metrics that lm-eval gives each document.

    Tasks that make their own texts (RULER) make them of the evaluated length, with the tokenizer that the model's name stands
    for; the others ignore the length, and texts beyond the model's positions are refused. Metrics that lm-eval only knows over a
    whole corpus are left out. Prompts and scores are lm-eval's: those of its longbench_* differ in places from the official ones,
    which "longbench:SET" has.

    folder: tasks of your own. Rows carry a digest of all its files, so keep the rows elsewhere; records outside it are not noticed.
    """

    def __init__(self, name: str, folder: str | Path | None = None) -> None:
        require(find_spec("lm_eval") is not None, 'tasks of lm-eval need it; run: pip install "attnsieve[eval]"')
        self.name, self._task_name, self._folder = f"lm-eval:{name}", name, folder
        self._built: dict[int, Any] = {}
        self.variant = "" if folder is None else folder_digest(Path(folder))

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Document]:
        """See `Task.items`."""
        task = self._build(tokenizer, length)
        documents = len(task.eval_docs)
        require(count <= documents, f"{self.name} has {documents} documents, {count} were asked for: ask for fewer items")
        return [Document(length, place) for place in random.Random(f"{self.name}/{seed}").sample(range(documents), count)]

    def ids(self, tokenizer: Any, item: Document) -> list[int]:
        """See `Task.ids`: the text of the first request, with the task's description, examples and the answer's beginning."""
        return encode(tokenizer, str(self._requests(item)[0].args[0]))

    def tokens(self, tokenizer: Any, item: Document) -> int:
        """See `Task.tokens`."""
        return max(_needed(tokenizer, request) for request in self._requests(item))

    def observe(self, model: Any, tokenizer: Any, item: Document) -> dict[str, float]:
        """See `Task.observe`."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        with redirect_stderr(io.StringIO()):  # lm-eval shows bars of its own for every document
            found = evaluate(
                # Of texts beyond what it takes for the model's length, lm-eval would leave out the beginning.
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest_text(model) or sys.maxsize),
                {self._task_name: self._for(item)},
                samples={self._task_name: [item.place]},
                bootstrap_iters=0,
            )
        return measures(found["samples"][self._task_name], item.length)

    def _for(self, item: Document) -> Any:
        """The item's task, which draws the same examples for the item's prompt in every run: lm-eval's own choice is different for
        dense attention and for every plan."""
        task = self._built[item.length]
        task.set_fewshot_seed(item.place)
        return task

    def _requests(self, item: Document) -> Any:
        """What lm-eval asks the model about a document."""
        task = self._for(item)
        with redirect_stderr(io.StringIO()):
            task.build_all_requests(samples=[item.place])
        return task.instances

    def _build(self, tokenizer: Any, length: int) -> Any:
        from lm_eval.tasks import TaskManager

        if length not in self._built:
            settings = {"tokenizer": tokenizer.name_or_path, "max_seq_lengths": [length]}
            folder = None if self._folder is None else str(self._folder)
            manager = TaskManager(metadata=settings, include_path=folder)
            try:
                with seeded(), redirect_stdout(sys.stderr):  # RULER tells how it goes, where results stand
                    self._built[length] = manager.load(self._task_name)["tasks"][self._task_name]
            except Exception as error:
                raise UserError(
                    f"lm-eval cannot make its task {self._task_name!r}: {type(error).__name__}: {str(error)[:200]}; "
                    "check the name, the network, and the folder of your own tasks"
                ) from error
        return self._built[length]


def folder_digest(folder: Path) -> str:
    """8 hex digits of the names and contents of a folder's files, hidden and compiled ones aside."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    seen = [name for name in names if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)]
    listing = "".join(f"{name.as_posix()} {content_digest(folder / name)}\n" for name in seen)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:8]


@contextmanager
def seeded() -> Iterator[None]:
    """The global generators, which RULER's texts are drawn from, in the state that lm-eval's own command starts with."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _needed(tokenizer: Any, request: Any) -> int:
    """Positions that a request takes, the answer included; none for the likelihood of a whole text, which is read in windows."""
    if request.request_type == "loglikelihood_rolling":
        return 0
    text, rest = request.args
    if isinstance(rest, str):
        return len(encode(tokenizer, text + rest))
    return len(encode(tokenizer, text)) + int(next((rest[name] for name in NEW_TOKENS if name in rest), DEFAULT_NEW_TOKENS))


def measures(samples: list[Mapping[str, Any]], length: int) -> dict[str, float]:
    """The numbers of one document, named by metric, and by filter where there are several."""
    found = {}
    for sample in samples:
        for metric in sample["metrics"]:
            # RULER names its metric by the length and gives -1 for all others.
            other_length = metric.isdigit() and int(metric) != length
            if other_length or not isinstance(sample[metric], Real):
                continue
            name = "string_match" if metric.isdigit() else metric
            found[name if len(samples) == 1 else f"{name},{sample['filter']}"] = float(sample[metric])
    require(bool(found), "lm-eval gave no number for a single document of this task: its metric needs the whole corpus")
    return found
