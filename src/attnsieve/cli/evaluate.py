"""attnsieve eval: plans beside dense attention, on the same items, as result rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from attnsieve.cli import options, output
from attnsieve.errors import require
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan


def evaluate(
    model: options.Model,
    plan: Annotated[list[str] | None, typer.Option(help="A saved plan: a directory or a hub id; repeat for several.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="One pattern for every head, such as 'sink(4) | window(256)'; repeat for several.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="kv, passkey, needle-single-2, perplexity, fidelity, longeval-lines, longbench:SET and others.")
    ] = "kv,fidelity",
    lengths: Annotated[
        str,
        typer.Option(
            help="Lengths of the items in tokens, such as 1024,4K. Beyond it prompts of LongBench and LV-Eval lose their middle."
        ),
    ] = "1024",
    items: Annotated[int, typer.Option(help="Items of every task and length.", min=1)] = 8,
    text: Annotated[
        str | None,
        typer.Option(help="Text for perplexity, fidelity and needles: a file, synthetic, python-docs, bible, essays."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder, file or hub id of the data sets of LongEval, LongBench, LV-Eval, lm-eval.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Add rows to this .jsonl file; runs that it holds already are not repeated.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Measure what plans cost: each beside dense attention, on the same items.

    Example: attnsieve eval smollm2-135m --plan plans/book --tasks kv,fidelity --lengths 1024,2048 --out rows.jsonl
    """
    from attnsieve.evaluation import evaluate as measure
    from attnsieve.evaluation import make_tasks
    from attnsieve.hf import check_positions, fingerprint
    from attnsieve.show import result_table

    wanted = named_plans(plan or [], pattern or [])
    measured = options.lengths_of(lengths)
    chosen = make_tasks(options.parts_of(tasks), text=text, data=data)
    options.rows_file(out)
    network, tokenizer = options.load(model, device, dtype)
    check_positions(network, max(measured))
    mark = fingerprint(network)
    plans = {name: options.plan_for(choice, mark) for name, choice in wanted.items()}
    rows = [asdict(row) for row in measure(network, tokenizer, plans, chosen, measured, items, seed, out)]
    if json:
        output.result_json({"rows": rows})
    else:
        output.result(result_table(rows))
    if out is not None:
        output.note(f"rows are in {out}; next: attnsieve show {output.quoted(out)} --out FIGURES")


def named_plans(plans: Sequence[str], patterns: Sequence[str]) -> dict[str, Plan | Pattern]:
    """Plans and patterns by the name that rows carry: the path, or the pattern's own text."""
    require(bool(plans or patterns), "say what to measure: --plan DIRECTORY or --pattern 'sink(4) | window(256)', or several")
    rules = [Pattern.parse(text) for text in patterns]
    named: dict[str, Plan | Pattern] = {path.rstrip("/"): Plan.from_pretrained(path) for path in plans}
    return named | {str(rule): rule for rule in rules}
