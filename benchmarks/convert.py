"""A dense model turned into DMA: perplexity and retrieval as it was, as it is after conversion, and after continued training.

    python benchmarks/convert.py smollm2-135m --keeps 256,512 --steps 300 --minutes 8 --out benchmarks/results/convert.jsonl

Trained on source files of Python, torch and transformers and, for a half, on synthetic text with records and questions; measured
on Python's language reference and on key-value lists. Nothing that is measured is trained on.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path
from typing import Any

import torch
from experiment import RESULTS, Budget, Rows, device_of, draw, measure_and_report, publish, several
from language import Language, run
from language_text import documents
from torch import Tensor
from tqdm.auto import tqdm

from attnsieve.evaluation import evaluate, make_task
from attnsieve.evaluation.text import PACKAGED, synthetic_text
from attnsieve.hf import load_model
from attnsieve.nn import DmaForCausalLM, convert

METRICS = {"nll": "text, nats per token", "exact_match": "kv exact match", "answer_nll": "kv answer, nats per token"}
STAGES = ("dense", "converted", "trained")
DOCUMENT = 60_000  # characters of a synthetic document
MEASURED = "python-docs"


def training_tokens(tokenizer: Any, tokens: int) -> Tensor:
    """int64 [tokens]: documents of both kinds in turn."""
    held_out = PACKAGED[MEASURED]()
    real = (text for _, text in documents() if len(text) > 1000 and text[:1000] not in held_out)
    ids: list[int] = []
    with tqdm(total=tokens, desc="text", unit="token", disable=None) as bar:
        for seed in count(1):
            for text in (next(real), synthetic_text(DOCUMENT, seed)):
                before = len(ids)
                ids += [*tokenizer(text[:DOCUMENT], verbose=False).input_ids, tokenizer.eos_token_id]
                bar.update(len(ids) - before)
            if len(ids) >= tokens:
                return torch.tensor(ids[:tokens])
    raise AssertionError


def measured(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Means and standard errors by metric and length."""
    tasks = [make_task("perplexity", text=arguments.text), make_task("kv")]
    found = evaluate(model.eval(), tokenizer, {}, tasks, arguments.lengths, arguments.items)
    numbers: dict[str, float | None] = {}
    for row in found:
        if row.metric in METRICS:
            numbers[f"{row.metric}@{row.length}"] = row.value
            numbers[f"{row.metric}@{row.length} stderr"] = row.stderr
    return numbers


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per stage and budget."""
    names = [name for name in rows[0] if "@" in name and not name.endswith("stderr")]
    header = ["w", "stage", "steps", *(f"{METRICS[name.split('@')[0]]}, {name.split('@')[1]} tokens" for name in names)]
    ordered = sorted(rows, key=lambda row: (row["keep"], STAGES.index(row["stage"])))
    body = [
        [str(row["keep"] or "-"), row["stage"], str(row["steps"]), *(f"{row[name]:.3f}" for name in names)] for row in ordered
    ]
    trained = max(row.get("trained_tokens", 0) for row in rows)
    notes = f"Rows keep w keys, the {rows[0]['window']} newest and the first {rows[0]['sinks']}; trained on {trained:,} tokens at most."
    publish(path, f"{rows[0]['model']}: dense, converted to DMA, trained on", header, body, notes)
    name = next((name for name in names if name.startswith("answer_nll")), names[0])
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in ordered:
        keeps = [other["keep"] for other in ordered if other["keep"]] if row["stage"] == "dense" else [row["keep"]]
        for keep in sorted(set(keeps)):
            curves.setdefault(row["stage"], []).append((float(keep), row[name], row[f"{name} stderr"] or 0.0))
    if len(curves["dense"]) > 1:
        draw(path, {rows[0]["model"]: curves}, "w, keys a row keeps", METRICS[name.split("@")[0]])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--keeps", type=several(int), default=[512])
    parser.add_argument("--window", type=int, default=64, help="newest keys, kept beside the budget")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--initial-A", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of text to train on")
    parser.add_argument("--text", default=MEASURED, help="text whose loss is measured")
    parser.add_argument("--lengths", type=several(int), default=[1024, 2048])
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=8, help="training for a w stops after this; 0: report only")
    parser.add_argument("--models", type=Path, help="folder for the trained models, kept only if given")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "convert.jsonl")
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace, rows: Rows) -> None:
    """Every stage that has no row yet."""
    device = device_of(arguments.device)
    dense, tokenizer = load_model(arguments.model, device=device)
    name = dense.config._name_or_path
    name = Path(name).name if Path(name).exists() else name
    names = ("window", "sinks", "initial_A", "length", "batch", "rate", "items", "lengths", "text")
    shape = {"model": name} | {name: getattr(arguments, name) for name in names}

    def stage(stage: str, keep: int, steps: int, model: Any, **numbers: Any) -> None:
        key = {**shape, "stage": stage, "keep": keep, "steps": steps}
        if rows.find(key) is None:
            row = rows.add(key, measured(model, tokenizer, arguments) | numbers, device)
            told = ("stage", "keep", *(name for name in row if "@" in name and "stderr" not in name))
            print({name: row[name] for name in told}, flush=True)

    stage("dense", 0, 0, dense)
    text = None
    for keep in arguments.keeps:
        if rows.find({**shape, "stage": "trained", "keep": keep, "steps": arguments.steps}):
            continue
        options = {"window": arguments.window, "sinks": arguments.sinks, "initial_A": arguments.initial_A}
        model: DmaForCausalLM = convert(dense, keep, **options)
        stage("converted", keep, 0, model)
        text = training_tokens(tokenizer, arguments.tokens).to(device) if text is None else text
        language = Language(model, text, arguments.steps, 0, arguments)
        trained = run(language, f"w {keep}", Budget(arguments.minutes))
        if trained is not None:
            stage("trained", keep, language.training.done, model, **trained)
            if arguments.models:
                model.save_pretrained(arguments.models / f"{name}-{keep}")


def main() -> None:
    measure_and_report(parse(), measure_all, report)


if __name__ == "__main__":
    main()
