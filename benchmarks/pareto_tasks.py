"""The tasks of `pareto.py`: with aligned items, which are made once and kept in a folder."""

import os
import pickle
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from attnsieve.evaluation.tasks import Task, make_task
from attnsieve.evaluation.tasks.aligned import AlignedTask, aligned
from attnsieve.evaluation.tasks.questions import QuestionTask


@cache
def task_of(name: str) -> Task:
    """Question tasks with aligned items and forced answers alone: writing them out takes a forward pass per token.

    One object per name, so that equal cells are recognised.
    """
    task = make_task(name, text="python-docs" if name.startswith("needle") else None)
    if not isinstance(task, QuestionTask) or not task.forced:
        return task
    return aligned(replace(task, generation=None))


@dataclass(frozen=True)
class KeptTask(AlignedTask):
    """A task whose items lie in a folder once some process has made them."""

    folder: Path = Path()

    def items(self, tokenizer: Any, length: int, count: int, seed: int) -> Any:
        """See `Task.items`."""
        path = self.folder / f"{self.name}-{length}-{count}-{seed}.pickle"
        if path.exists():
            return pickle.loads(path.read_bytes())
        made = super().items(tokenizer, length, count, seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(pickle.dumps(made))
        fresh.rename(path)
        return made


def kept(task: Task, folder: Path) -> Task:
    """`task`; with aligned items, which take long to find, those of the folder."""
    if not isinstance(task, AlignedTask):
        return task
    return KeptTask(**{field.name: getattr(task, field.name) for field in fields(task)}, folder=folder)
