"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from attnsieve.errors import UserError
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

__all__ = ["TASKS", "Item", "Query", "QuestionTask", "Task", "make_task"]

Source = str | Path | None


def _needle(name: str, text: Source, data: Source) -> Task:
    return needle_task(name, text_source(text or "essays"))


# Each is made from a text (name or path) and a data source (folder, file or hub id), both None where the user gave none.
TASKS: dict[str, Callable[[Source, Source], Task]] = {
    "kv": lambda text, data: key_value(),
    "passkey": lambda text, data: passkey(),
    "longeval-lines": lambda text, data: lines(),
    "longeval-lines-prefix": lambda text, data: lines_prefix(),
    "longeval-topics": lambda text, data: topics(None if data is None else Path(data)),
    "perplexity": lambda text, data: Perplexity(text_source(text or "synthetic")),
    "fidelity": lambda text, data: Fidelity(text_source(text or "synthetic")),
    **{name: partial(_needle, name) for name in VARIANTS},
}
# "family:set", as in "longbench:hotpotqa".
FAMILIES: dict[str, Callable[..., Task]] = {"lv-eval": lv_eval_task, "longbench": longbench_task, "lm-eval": LmEvalTask}


def make_task(name: str, *, text: Source = None, data: Source = None) -> Task:
    """The task `name`: one of `TASKS`, "lv-eval:SET_LEVEL", "longbench:SET" or "lm-eval:TASK".

    text: "synthetic" (the default), "bible", "python-docs", "essays" (the default for needles) or a text file. data: LongEval's
    conversations.jsonl, the folder or hub id of LV-Eval or LongBench, or a folder of lm-eval tasks of your own. Raises
    UserError for unknown names and sources.
    """
    family, colon, subset = name.partition(":")
    if colon and family in FAMILIES:
        return FAMILIES[family](subset) if data is None else FAMILIES[family](subset, data)
    if name not in TASKS:
        known = [*TASKS, *(f"{family}:SET" for family in FAMILIES)]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"unknown task {name!r}; {hint}")
    return TASKS[name](text, data)
