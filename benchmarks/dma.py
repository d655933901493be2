"""DMA on a GPU, selection included: forward, forward and backward, and decode, beside dense attention and sliding windows.

    python benchmarks/dma.py forward backward decode windows windows-backward --seconds 90 --out benchmarks/results/dma.jsonl

forward, backward: `dynamic_mask_attention` from q, k, v to the output (and to the gradients of q, k, v, dt_weight and A): scores,
selection, tile lists and attention. decode: a step with the bounded cache after n tokens, as a CUDA graph. windows,
windows-backward: a sliding window of w keys by our kernels, FlashAttention 4 (its window_size) and FlexAttention, lists built
before. Dense kernels are measured once for each length. Lines come in the order of what they tell; after --seconds no further
one is started; lines that the file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dma_windows import window_kernels
from experiment import RESULTS, Rows, draw, publish, several
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.bench import kernels
from attnsieve.bench.case import Case
from attnsieve.bench.check import Verdict, check_rows
from attnsieve.bench.rows import Dense, Row, write
from attnsieve.bench.shapes import SHAPES, Shape, shape_of
from attnsieve.bench.suite import Skipped, Suite
from attnsieve.bench.timing import measure_with_peak, recorded
from attnsieve.layout import Layout
from attnsieve.nn import BoundedCache, SelectionRule, dynamic_mask_attention
from attnsieve.nn.scores import key_scores
from attnsieve.spans import Spans

LENGTHS = (32768, 131072, 8192, 65536, 4096, 262144)
# w; the first of a suite is what its target is stated for.
BUDGETS = {
    "forward": (1024, 2048, 512),
    "backward": (2048, 1024, 512),
    "decode": (2048, 1024, 512),
    "windows": (1024, 2048, 512),
    "windows-backward": (2048, 1024, 512),
}
# What a row of a suite is called.
OPS = {
    "forward": "prefill",
    "backward": "forward_backward",
    "decode": "decode",
    "windows": "prefill",
    "windows-backward": "forward_backward",
}
DECODE_LENGTHS = (4096, 1048576, 131072, 32768, 262144)
FILL = 16384  # tokens that fill a cache at once


@dataclass(frozen=True)
class Inputs:
    """Random q, k, v of one layer and its parameters."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    a: Tensor

    @classmethod
    def random(cls, shape: Shape, n: int, dtype: torch.dtype, device: str, grad: bool = False) -> Inputs:
        torch.manual_seed(0)
        make = lambda *size, kind=dtype: torch.randn(size, device=device, dtype=kind).requires_grad_(grad)  # noqa: E731
        heads, width = shape.kv_heads, shape.head_dim
        weight = (torch.randn(heads, heads * width, device=device) * 0.02).requires_grad_(grad)
        a = torch.full((heads,), 0.1, device=device).requires_grad_(grad)
        return cls(make(1, shape.q_heads, n, width), make(1, heads, n, width), make(1, heads, n, width), weight, a)

    def attend(self, budget: int) -> Tensor:
        return dynamic_mask_attention(self.q, self.k, self.v, dt_weight=self.weight, A=self.a, keep_window_size=budget)

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.weight, self.a]

    def call(self, budget: int) -> Call:
        """What the attention kernel computes inside, for the oracle."""
        delta, sigma = key_scores(self.v, self.weight, None, self.a)
        rule, n = SelectionRule(budget), self.k.shape[2]
        layout = Layout(n, rule.ends(sigma), most_keys=rule.slots)
        spans = Spans.full(1, self.q.shape[2], n, self.q.device)
        return Call(self.q, self.k, self.v, layout, spans, self.q.shape[-1] ** -0.5, delta.detach())


class Bench:
    """Measurements of one shape; dense attention of a length is measured once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.shape, self.device, self.budget_ms = shape_of(arguments.shape), arguments.device, arguments.budget_ms
        self.dtype = torch.bfloat16 if torch.device(self.device).type == "cuda" else torch.float32
        self.baselines, self.by = [name for name in arguments.baselines.split(",") if name], arguments.windows_by.split(",")
        self._dense: dict[tuple[str, int], Dense | None] = {}

    def dense(self, op: str, n: int) -> Iterator[Row]:
        """Rows of dense kernels at this length, the first time; their fastest is what later rows are compared with.

        Dense attention of long texts takes seconds: one kernel alone beyond 32K, no gradients beyond 128K.
        """
        if (op, n) not in self._dense:
            short = n <= 32768 or op == "decode"
            names = self.baselines if short else self.baselines[: n <= 131072 or op != "forward_backward"]
            suite = Suite(op, ["window(1)"], [self.shape], [n], [], names, self.dtype, self.device, 1, self.budget_ms)
            rows = [row for row in suite.rows() if not isinstance(row, Skipped)]
            self._dense[op, n] = kernels.fastest(rows)
            yield from rows

    def forward(self, n: int, budget: int) -> Iterator[Row]:
        yield from self.dense("prefill", n)
        inputs = Inputs.random(self.shape, n, self.dtype, self.device)
        verdict = check_rows(inputs.call(budget), inputs.attend(budget), None)
        yield self._row("prefill", n, budget, lambda: inputs.attend(budget), verdict)

    def backward(self, n: int, budget: int) -> Iterator[Row]:
        """The kernels' gradients were checked with op forward_backward of the suite, the module's by tests/gpu."""
        yield from self.dense("forward_backward", n)
        inputs = Inputs.random(self.shape, n, self.dtype, self.device, grad=True)
        d_out = torch.randn_like(inputs.q)
        run = lambda: torch.autograd.grad(inputs.attend(budget), inputs.leaves(), d_out)  # noqa: E731
        verdict = check_rows(inputs.call(budget), inputs.attend(budget).detach(), None)
        yield self._row("forward_backward", n, budget, run, verdict)

    def decode(self, n: int, budget: int) -> Iterator[Row]:
        yield from self.dense("decode", n)
        cache, step = BoundedCache(SelectionRule(budget)), Inputs.random(self.shape, 1, self.dtype, self.device)
        for first in range(0, n, FILL):
            part = Inputs.random(self.shape, min(FILL, n - first), self.dtype, self.device)
            cache.attend(part.q, part.k, part.v, *key_scores(part.v, part.weight, None, part.a))
        scores = key_scores(step.v, step.weight, None, step.a)
        run = recorded(lambda: cache.attend(step.q, step.k, step.v, *scores), self.device)
        yield replace(self._row("decode", n, budget, run, None), peak_bytes=cache.nbytes)

    def windows(self, n: int, budget: int, op: str) -> Iterator[Row]:
        """Outputs are checked on sampled rows; of gradients those of ours, by op forward_backward of the suite."""
        yield from self.dense(op, n)
        call = Case.of(f"window({budget})+", n, self.shape, self.dtype, self.device).call()
        leaves = [call.q, call.k, call.v]
        d_out = torch.randn_like(call.q)
        for name in self.by:
            attended = partial(window_kernels(budget)[name], call)
            try:
                verdict = check_rows(call, attended(), None)
                run = attended
                if op == "forward_backward":
                    for leaf in leaves:
                        leaf.requires_grad_()
                    run = lambda attended=attended: torch.autograd.grad(attended(), leaves, d_out)  # noqa: E731
                row = self._row(op, n, budget, run, verdict)
            except Exception as error:  # others' kernels fail in their own ways, and then the rest is still measured
                print(f"skipped {name} window({budget}) at {n}: {error}")
                continue
            finally:
                for leaf in leaves:
                    leaf.requires_grad_(False)
            yield replace(row, backend=name, mask=f"window({budget})", includes_mask_building=False)

    def _row(self, op: str, n: int, budget: int, run: Callable[[], Any], verdict: Verdict | None) -> Row:
        case = Case.of(f"dma-{budget}", n, self.shape, self.dtype, self.device)
        case = replace(case, q_len=1) if op == "decode" else case
        kept, pairs = budget * n - budget * (budget - 1) / 2 if budget < n else n * (n + 1) / 2, n * (n + 1) / 2
        density = min(1.0, budget / n) if op == "decode" else kept / pairs
        times, peak = measure_with_peak(run, self.device, self.budget_ms)
        more = {"baseline": self._dense[op, n], "verdict": verdict}
        return Row.of(op, "dynamic_mask_attention", case, times, peak, density=density, building=True, **more)


def lines(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(suite, n, w) of all suites, the most telling first; another w counts as much as two further lengths."""
    found = []
    for suite in arguments.suites:
        lengths = arguments.lengths or (DECODE_LENGTHS if suite == "decode" else LENGTHS)
        budgets = arguments.budgets or BUDGETS[suite]
        found += [(place + 2 * rank, suite, n, w) for rank, w in enumerate(budgets) for place, n in enumerate(lengths)]
    return ((suite, n, w) for _, suite, n, w in sorted(found, key=lambda line: line[0]))


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per operation, mask, kernel and length, of repeated ones the last; and the times against the length."""
    what = lambda row: (row["op"], row["kv_len"], row["mask"], row["backend"])  # noqa: E731
    ordered = sorted({what(row): row for row in rows}.values(), key=what)
    number = lambda value, digits=2: "-" if value is None else f"{value:.{digits}f}"  # noqa: E731
    header = ["op", "tokens", "mask", "backend", "lists and selection", "ms", "over fastest dense", "efficiency", "MiB"]
    body = [
        [
            row["op"],
            str(row["kv_len"]),
            row["mask"],
            row["backend"],
            "included" if row["includes_mask_building"] else "given",
            number(row["ms_p50"], 3),
            number(row["speedup"]),
            number(row["efficiency"]),
            number(row["peak_bytes"] and row["peak_bytes"] / 2**20, 0),
        ]
        for row in ordered
    ]
    publish(path, "DMA, selection included", header, body)
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in ordered:
        window = row["mask"].startswith("window")
        name = (
            f"{row['backend']}, {row['mask']}" if window else row["mask"] if row["mask"].startswith("dma") else row["backend"]
        )
        panels.setdefault(row["op"], {}).setdefault(name, []).append((row["kv_len"], row["ms_p50"], 0.0))
    draw(path, panels, "tokens", "ms", log_y=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=tuple(OPS))
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--budget-ms", type=float, default=100.0, help="how long one measurement is repeated")
    parser.add_argument("--lengths", type=several(int), default=[], help="instead of all, as 4096,32768")
    parser.add_argument("--budgets", type=several(int), default=[], help="w, instead of all")
    parser.add_argument(
        "--baselines",
        default="fa4,cudnn,flash",
        help="the first alone beyond 32K; those that are missing are skipped; may be none",
    )
    parser.add_argument("--windows-by", default="triton,fa4", help="kernels of windows; flex takes seconds to compile")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "dma.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments, start = parse(), time.monotonic()
    bench, found = Bench(arguments), Rows(arguments.out)
    for suite, n, budget in lines(arguments):
        window, op = suite.startswith("windows"), OPS[suite]
        mask = f"window({budget})" if window else f"dma-{budget}"
        key = {"op": op, "mask": mask, "kv_len": n, "shape": arguments.shape}
        if all(found.find(key | ({"backend": name} if window else {})) for name in bench.by):
            continue
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time, not measured: {suite} {n} {mask}")
            continue
        try:
            for row in bench.windows(n, budget, op) if window else getattr(bench, suite)(n, budget):
                print(f"[{time.monotonic() - start:5.1f} s] {row}", flush=True)
                write([row], arguments.out)
        except Exception as error:  # one line must not cost the others
            print(f"no row: {suite} {n} {mask}: {error!r}")
    found = Rows(arguments.out)
    if found.all:
        report(arguments.out, found.all)


if __name__ == "__main__":
    main()
