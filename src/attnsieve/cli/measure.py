"""attnsieve measure: try candidate patterns on every head of a model, and save what they keep and cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.cli import options, output
from attnsieve.cli.profile import text_windows
from attnsieve.errors import require
from attnsieve.patterns import Pattern


def measure(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Directory for the measurement.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on: a file, synthetic, python-docs, bible, essays. Repeat for several."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks whose documents to measure on as well, such as kv: what retrieval needs.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths of the texts in tokens, such as 1024,4K.")] = "1024",
    documents: Annotated[int, typer.Option(help="Texts of every source and length.", min=1)] = 2,
    last: Annotated[
        int | None,
        typer.Option(
            help="Judge candidates by so many last rows of each text alone, such as 16. Texts of tasks then end in one question's "
            "answer. Measure one task at a time and give fit all of them: the worst decides.",
            min=1,
        ),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern to try, such as 'sink(4) | window(256)'; repeat for several. Without any, the usual ones."
        ),
    ] = None,
    last_rows: Annotated[
        int, typer.Option(help="For the usual ones: the last queries of a prompt keep every key, this many.", min=0)
    ] = 0,
    rows: Annotated[
        int,
        typer.Option(
            help="For the usual ones: of 64 queries, how many choose keys for all. All 64 copy best; choosing takes longest.",
            min=1,
        ),
    ] = 8,
    share: Annotated[
        str, typer.Option(help="For the usual ones: kv lets the query heads of a KV group choose together.")
    ] = "none",
    wide_windows: Annotated[
        bool,
        typer.Option(
            "--wide-windows",
            help="For the usual ones: windows of up to half a text, for fit --last-rows 32 --dense-decode.",
        ),
    ] = False,
    backend: Annotated[str, typer.Option(help="Who computes attention: auto, triton, fa4, portable, reference.")] = "auto",
    seed: options.Seed = 1_000_003,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Try candidate patterns on every head of MODEL beside its own attention: density, retained mass, output error.

    Then `attnsieve fit` chooses one per head within a budget. Use texts that are not scored later; the seed differs from the
    one that eval takes by default.

    Example: attnsieve measure smollm2-135m --data book.txt --tasks kv --lengths 1024,2048 --wide-windows --out measured/book

    Example: attnsieve measure smollm2-135m --tasks kv --lengths 2048 --last 16 --out measured/answers
    """
    from attnsieve.fitting import default_candidates
    from attnsieve.hf import check_positions
    from attnsieve.hf import measure as compare
    from attnsieve.profiling import Measurement

    options.new_folder(out, Measurement)
    wanted = options.lengths_of(lengths)
    require(bool(data or tasks), "say what to measure on: --data FILE, --tasks kv, or both")
    rules: list[Pattern] = [Pattern.parse(text) for text in candidates or []]
    require(
        not rules or (not last_rows and share == "none" and rows == 8 and not wide_windows),
        "--last-rows, --rows, --share and --wide-windows are for the usual candidates: write them into yours",
    )
    rules = rules or default_candidates(
        max(wanted),
        last_rows=last_rows,
        rows=rows,
        share=share,  # type: ignore[arg-type]
        wide_windows=wide_windows,
    )
    read = text_reader(data or [], tasks, answered=last is not None)
    network, tokenizer = options.load(model, device, dtype)
    check_positions(network, max(wanted))
    texts = [text for length in sorted(set(wanted)) for text in read(tokenizer, length, documents, seed)]
    found = compare(network, texts, rules, last=last, backend=backend)
    found.save_pretrained(out)
    at = output.quoted(out)
    output.note(f"saved in {out}; next: attnsieve fit {at} --density 0.25 --out PLAN, or --mass 0.95, or --max-error 0.1")
    if json:
        output.result_json({"out": str(out), **found.to_config()})
    else:
        output.result(str(found))


def text_reader(data: list[str], tasks: str | None, *, answered: bool) -> Callable[[Any, int, int, int], list[list[int]]]:
    """What gives token ids of `count` texts of every source, from a tokenizer, a length, count and a seed. answered: texts of tasks end
    in the answer of one question; questions are spread over their documents.

    Raises UserError for unknown sources, and for tasks that ask nothing, before any model is loaded.
    """
    from attnsieve.evaluation import make_task
    from attnsieve.evaluation.tasks.questions import QuestionTask, answered_ids
    from attnsieve.evaluation.tasks.records import RecordTask
    from attnsieve.evaluation.text import text_source

    sources = [text_source(name) for name in data]
    chosen = [make_task(name) for name in options.parts_of(tasks)] if tasks else []
    for task in chosen if answered else []:
        asks = isinstance(task, QuestionTask | RecordTask)
        require(asks, f"--last measures a question and its answer, and {task.name!r} has none: expected tasks such as kv")

    def read(tokenizer: Any, length: int, count: int, seed: int) -> list[list[int]]:
        items = [
            answered_ids(tokenizer, item, (x + 0.5) / count) if answered else task.ids(tokenizer, item)
            for task in chosen
            for x, item in enumerate(task.items(tokenizer, length, count, seed))
        ]
        # Measurements are kept per length, and items of a task are as long as they happen to be: the shortest decides.
        shortest = min(map(len, items), default=length)
        windows = text_windows(sources, tokenizer, shortest, count * len(sources), seed) if sources else []
        return [ids[-shortest:] for ids in items] + windows

    return read
