"""Which heads lose what under a plan: what a question's rows keep per head, and what dense layers and heads give back.

    python benchmarks/heads.py smollm2-135m PLAN --task kv --length 4096 --items 8 --out heads/

1. On dense activations: density, retained mass and output error per head, of the rows that ask and not of the document.
2. The plan with one layer dense, for every layer. 3. With one head dense, for every head of the layers that gave most back.
Rows of steps 2 and 3 go to OUT, are not measured again, and --shard i/k shares them among processes; the report is written by
each process from what is there.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from claims import Board, add_sharing_options
from pareto import join
from pareto_tasks import task_of

from attnsieve import Plan
from attnsieve.evaluation import layer_fidelity
from attnsieve.evaluation.compare import Runs
from attnsieve.evaluation.ledger import Cell
from attnsieve.evaluation.rows import Row
from attnsieve.evaluation.tasks.aligned import rests
from attnsieve.evaluation.tokens import encode
from attnsieve.hf import load_model
from attnsieve.patterns import dense
from attnsieve.show import markdown, percent
from attnsieve.show.results import with_error

WORST_HEADS, LEAST_LOST = 20, 1e-4


def main() -> None:
    arguments = parse()
    model, tokenizer = load_model(arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    plan, (number, count) = Plan.from_pretrained(arguments.plan), arguments.shard
    runs = Runs(model, tokenizer, arguments.out / f"rows-{number}.jsonl", progress=count == 1)
    cell = Cell(task_of(arguments.task), arguments.length, arguments.items, 0)
    stop = time.monotonic() + arguments.seconds
    lab = Restoring(runs, cell, Board(arguments.out / "claims"), arguments.plan.name, plan, stop)
    lab.wait(arguments.out)
    lab.run(lab.with_heads(lab.best_layers(arguments.out, arguments.layers)))
    written = arguments.out / "heads.md"
    written.write_text(f"{restored(join(arguments.out))}\n", encoding="utf-8")  # Should what follows be cut off.
    kept = kept_by_questions(model, tokenizer, plan, cell)
    written.write_text(report(join(arguments.out), plan, kept), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("plan", type=Path, help="a folder")
    parser.add_argument("--task", default="kv")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3, help="layers whose heads are tried one by one")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_sharing_options(parser)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


@dataclass
class Restoring:
    """A plan, and the same plan with a layer or a head that is dense again."""

    runs: Runs
    cell: Cell
    board: Board
    name: str
    plan: Plan
    stop: float

    def run(self, plans: Iterator[tuple[str, Plan]]) -> None:
        for name, plan in plans:
            if time.monotonic() < self.stop and self.board.claim(name):
                self.runs.cell(self.cell, {name: plan})
                self.board.finish(name)

    def with_layers(self, layers: Any) -> Iterator[tuple[str, Plan]]:
        yield self.name, self.plan
        for layer in layers:
            yield f"{self.name} L{layer}", self._dense_at(layer, range(len(self.plan.patterns[layer])))

    def with_heads(self, layers: list[int]) -> Iterator[tuple[str, Plan]]:
        for layer in layers:
            for head, pattern in enumerate(self.plan.patterns[layer]):
                if pattern != dense():
                    yield f"{self.name} L{layer} H{head}", self._dense_at(layer, range(head, head + 1))

    def _dense_at(self, layer: int, heads: range) -> Plan:
        rows = [list(row) for row in self.plan.patterns]
        for head in heads:
            rows[layer][head] = dense()
        return Plan(
            self.plan.fingerprint, tuple(map(tuple, rows)), {"method": "restored", "layer": layer, "heads": list(heads)}
        )

    def wait(self, out: Path) -> None:
        """Until all layers were tried, or the time is over. What a process leaves that has ended is tried by this one."""
        layers = range(len(self.plan.patterns))
        while time.monotonic() < self.stop:
            self.run(self.with_layers(layers))
            if {name for name, _ in self.with_layers(layers)} <= {row.plan for row in join(out)}:
                return
            time.sleep(0.5)

    def best_layers(self, out: Path, count: int) -> list[int]:
        """Those with the lowest NLL when dense."""
        found = {row.plan: row.value for row in join(out) if row.metric == "answer_nll"}
        layers = [layer for layer in range(len(self.plan.patterns)) if f"{self.name} L{layer}" in found]
        return sorted(layers, key=lambda layer: found[f"{self.name} L{layer}"])[:count]


def kept_by_questions(model: Any, tokenizer: Any, plan: Plan, cell: Cell) -> dict[str, torch.Tensor]:
    """float64 [layers, heads] each, means over the items' first questions: what their rows keep."""
    found = []
    for item in cell.task.items(tokenizer, cell.length, cell.items, cell.seed):
        query, rest = item.queries[0], rests(item)[1][0]
        asked = len(encode(tokenizer, rest + query.answers[0])) - 1
        ids = encode(tokenizer, query.prompt + query.gap + query.answers[0])[:-1]
        found.append(layer_fidelity(model, plan, ids, last=asked))
    return {name: torch.stack([getattr(one, name) for one in found]).mean(0) for name in ("density", "retained", "error")}


def report(rows: list[Row], plan: Plan, kept: dict[str, torch.Tensor]) -> str:
    """Runs by what they give back, then the heads that lose most of a question's attention."""
    return f"{restored(rows)}\n\n{losing(plan, kept)}\n"


def restored(rows: list[Row]) -> str:
    """Runs by NLL; differences and KL are to dense attention."""
    runs = {(row.plan, row.metric): row for row in rows}
    nll = {name: row for (name, metric), row in runs.items() if metric == "answer_nll"}
    cells = []
    for name in sorted(nll, key=lambda name: nll[name].value):
        right, kl, lost = runs[name, "exact_match"], runs[name, "answer_kl"], nll[name]
        cells.append(
            [
                name,
                percent(lost.density),
                with_error(right.value, right.stderr),
                with_error(lost.value, lost.stderr),
                "-" if lost.paired_difference is None else with_error(lost.paired_difference, lost.paired_stderr, sign=True),
                with_error(kl.value, kl.stderr),
            ]
        )
    return markdown(["run", "density %", "right", "NLL", "NLL difference", "KL"], cells)


def losing(plan: Plan, kept: dict[str, torch.Tensor]) -> str:
    """The heads that lose most of a question's attention; none where all its rows read every key."""
    lost, heads = (1 - kept["retained"]).flatten(), plan.fingerprint.heads
    worst = [
        [
            f"L{place // heads} H{place % heads}",
            str(plan.patterns[place // heads][place % heads]),
            *(percent(float(kept[name].flatten()[place])) for name in ("density", "retained", "error")),
        ]
        for place in lost.topk(min(WORST_HEADS, len(lost))).indices.tolist()
        if lost[place] > LEAST_LOST
    ]
    return markdown(["head", "rule", "density %", "kept by a question's rows %", "error %"], worst, left=(0, 1))


if __name__ == "__main__":
    main()
