"""Evaluation: tasks, scoring, fidelity to dense attention, baselines, and paired result rows.

tasks = [make_task("kv"), make_task("perplexity", text="book.txt")]
rows = evaluate(model, tokenizer, {"mine": plan}, tasks, lengths=[1024], items=8, out="eval.jsonl")
"""

from attnsieve.evaluation.compare import evaluate
from attnsieve.evaluation.fidelity import LayerFidelity, layer_fidelity
from attnsieve.evaluation.rows import Row, read_rows
from attnsieve.evaluation.tasks import TASKS, Task, make_task, make_tasks
from attnsieve.evaluation.text import synthetic_text, text_source, token_windows

__all__ = [
    "TASKS",
    "LayerFidelity",
    "Row",
    "Task",
    "evaluate",
    "layer_fidelity",
    "make_task",
    "make_tasks",
    "read_rows",
    "synthetic_text",
    "text_source",
    "token_windows",
]
