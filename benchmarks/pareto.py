"""Accuracy against density on a real model: baselines, uniform dynamic plans, and plans fitted to a budget.

    python benchmarks/pareto.py smollm2-135m --lengths 1024,2048 --items 8 --out benchmarks/results/eval-smollm2.jsonl

Candidates are measured and budgets are fitted on texts with other seeds than the ones that are scored. Runs that the file holds
already are not repeated.
"""

import argparse
from pathlib import Path

import torch

from attnsieve import Pattern, Plan, UserError
from attnsieve.evaluation.baselines import DYNAMIC, STATIC, dynamic_baseline, static_baseline
from attnsieve.evaluation.compare import evaluate
from attnsieve.evaluation.tasks import make_task
from attnsieve.evaluation.text import text_source, token_windows
from attnsieve.fitting import default_candidates, fit_budget
from attnsieve.hf import fingerprint, load_model, measure

CALIBRATION_SEED = 1_000_003


def main() -> None:
    arguments = parse()
    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = load_model(arguments.model, dtype=dtype, device=arguments.device)
    plans = budget_plans(model, tokenizer, arguments) | baseline_plans(model, arguments)
    plans = {name: plan for name, plan in plans.items() if name.startswith(arguments.only)}
    tasks = [make_task(name, text=arguments.text) for name in arguments.tasks.split(",")]
    rows = evaluate(model, tokenizer, plans, tasks, arguments.lengths, arguments.items, out=arguments.out)
    for row in rows:
        if row.metric in ("exact_match", "answer_nll", "kl"):
            print(
                f"{row.task:22s} {row.length:6d} {row.plan:34s} {row.density:.3f} {row.metric:12s} {row.value:.3f} ± {row.stderr:.3f}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[1024, 2048])
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--tasks", default="kv,longeval-lines-prefix")
    parser.add_argument("--densities", type=lambda text: [float(part) for part in text.split(",")], default=[0.1, 0.25, 0.5])
    parser.add_argument("--strengths", type=lambda text: [float(part) for part in text.split(",")], default=[0.9, 0.95])
    parser.add_argument("--text", default="synthetic")
    parser.add_argument("--calibration", type=int, default=2, help="texts of each kind to measure candidates on")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=("",), help="starts of plans' names")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def calibration_texts(tokenizer, arguments) -> list[list[int]]:
    """Plain text and key-value documents of the longest length, none of which is scored."""
    length, count = max(arguments.lengths), arguments.calibration
    records = make_task("kv")
    documents = [records.ids(tokenizer, item) for item in records.items(tokenizer, length, count, CALIBRATION_SEED)]
    shortest = min(map(len, documents))
    texts = token_windows(text_source(arguments.text), tokenizer, shortest, count, CALIBRATION_SEED)
    return [document[-shortest:] for document in documents] + texts


def budget_plans(model, tokenizer, arguments) -> dict[str, Plan]:
    texts = calibration_texts(tokenizer, arguments)
    measured = measure(model, texts, default_candidates(len(texts[0])))
    measured.save_pretrained(arguments.out.with_suffix("") / "measurement")
    plans = {}
    for density in arguments.densities:
        try:
            plans[f"budget-{density:g}"] = fit_budget(measured, density=density)
        except UserError as error:
            print(f"budget {density:g}: {error}")
    return plans


def baseline_plans(model, arguments) -> dict[str, Plan]:
    mark, plans = fingerprint(model), {}
    for name in STATIC:
        for density in arguments.densities:
            plans[f"{name}-{density:g}"] = static_baseline(name, mark, density=density, length=max(arguments.lengths))
    for name in DYNAMIC:
        for strength in [0.02, 0.1] if name == "flashprefill" else arguments.strengths:
            plans[f"{name}-{strength:g}"] = dynamic_baseline(name, mark, strength=strength)
    for mass in arguments.strengths:
        plans[f"probed-{mass:g}"] = Plan.uniform(
            mark, Pattern.parse(f"sink(4) | window(64) | probed_blocks(mass={mass}, block=16)")
        )
        plans[f"keys-{mass:g}"] = Plan.uniform(mark, Pattern.parse(f"sink(4) | window(32) | probed_keys(mass={mass})"))
    return plans


if __name__ == "__main__":
    main()
