"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from attnsieve.errors import UserError, require
from attnsieve.evaluation.tasks.base import Task
from attnsieve.evaluation.tasks.language import Fidelity, Perplexity
from attnsieve.evaluation.tasks.lm_eval_task import LmEvalTask
from attnsieve.evaluation.tasks.longbench import longbench_task
from attnsieve.evaluation.tasks.longeval import lines, lines_prefix, topics
from attnsieve.evaluation.tasks.lv_eval import lv_eval_task
from attnsieve.evaluation.tasks.needle import VARIANTS, needle_task
from attnsieve.evaluation.tasks.questions import Item, Query, QuestionTask
from attnsieve.evaluation.tasks.retrieval import key_value, passkey
from attnsieve.evaluation.text import text_source

__all__ = ["TASKS", "Item", "Query", "QuestionTask", "Task", "make_task", "make_tasks"]

Source = str | Path | None


class Maker(NamedTuple):
    """How a task is made: from the one option that it reads, None where the user gave none; `reads` is "text", "data" or ""."""

    make: Callable[[Source], Task]
    reads: str = ""


def _needle(name: str, text: Source) -> Task:
    return needle_task(name, text_source(text or "essays"))


TASKS: dict[str, Maker] = {
    "kv": Maker(lambda _: key_value()),
    "passkey": Maker(lambda _: passkey()),
    "longeval-lines": Maker(lambda _: lines()),
    "longeval-lines-prefix": Maker(lambda _: lines_prefix()),
    "longeval-topics": Maker(lambda data: topics(None if data is None else Path(data)), "data"),
    "perplexity": Maker(lambda text: Perplexity(text_source(text or "synthetic")), "text"),
    "fidelity": Maker(lambda text: Fidelity(text_source(text or "synthetic")), "text"),
    **{name: Maker(partial(_needle, name), "text" if kind.haystack == "essay" else "") for name, kind in VARIANTS.items()},
}
# "family:set", as in "longbench:hotpotqa"; all of them read data.
FAMILIES: dict[str, Callable[..., Task]] = {"lv-eval": lv_eval_task, "longbench": longbench_task, "lm-eval": LmEvalTask}


def make_task(name: str, *, text: Source = None, data: Source = None) -> Task:
    """The task `name`: one of `TASKS`, "lv-eval:SET_LEVEL", "longbench:SET" or "lm-eval:TASK".

    text: "synthetic" (the default), "bible", "python-docs", "essays" (the default for needles) or a text file. data: LongEval's
    conversations.jsonl, the folder or hub id of LV-Eval or LongBench, or a folder of lm-eval tasks of your own. Raises
    UserError for unknown names and sources, and for an option that the task does not read.
    """
    return make_tasks([name], text=text, data=data)[0]


def make_tasks(names: Sequence[str], *, text: Source = None, data: Source = None) -> list[Task]:
    """`make_task` of every name, each with the option that it reads. Raises UserError for an option that none of them reads."""
    makers, given = [_maker(name) for name in names], {"text": text, "data": data}
    for option, source in given.items():
        require(
            source is None or any(maker.reads == option for maker in makers),
            f"{option} {str(source)!r:.80} was given, but none of the tasks {', '.join(names)} reads it: leave it out, or add one of "
            f"{', '.join(_readers(option))}",
        )
    return [maker.make(given.get(maker.reads)) for maker in makers]


def _maker(name: str) -> Maker:
    family, colon, subset = name.partition(":")
    if colon and family in FAMILIES:
        build = FAMILIES[family]
        return Maker(lambda data: build(subset) if data is None else build(subset, data), "data")
    if name not in TASKS:
        known = [*TASKS, *_sets()]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def _readers(option: str) -> list[str]:
    return [name for name, maker in TASKS.items() if maker.reads == option] + (_sets() if option == "data" else [])


def _sets() -> list[str]:
    return [f"{family}:SET" for family in FAMILIES]
