"""Decode steps over ragged storage: memory and time by density, against a full cache under the same plan and against dense SDPA.

    python benchmarks/ragged.py                                  # one layer, 128K keys, 32/8 heads of width 128, bf16
    python benchmarks/ragged.py --n 8192 --device cpu            # the portable backend
    python benchmarks/ragged.py --tune                           # step times by the kernel's tuning and shares of work

Patterns are random columns and a window of 256; per-head ones differ between the query heads of a KV head, which then stores
their union. A step stores one token and attends to it, replayed from a CUDA graph on a GPU, L2 cold. Every row passes the oracle.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends.call import Call
from attnsieve.bench.check import check_rows
from attnsieve.bench.timing import measure, recorded
from attnsieve.device import device_name
from attnsieve.environment import environment
from attnsieve.hf.cache_layer import PROGRAMS
from attnsieve.patterns import Pattern, columns, window
from attnsieve.ragged import Kept, RaggedStore

if TYPE_CHECKING:
    from attnsieve.backends.triton.shares import Tuning

Q_HEADS, KV_HEADS, WIDTH, WINDOW = 32, 8, 128, 256
SCALE = WIDTH**-0.5
# keys, warps, tiles ahead, programs on a multiprocessor: what the library takes first, then by what may be gained.
TUNINGS = (
    "32,4,2,4 32,4,3,4 32,4,2,5 32,4,1,4 64,4,1,4 64,4,2,3 32,2,2,8 32,2,2,5 16,2,3,8 32,4,3,3 64,8,2,2 64,4,2,2 "
    "16,4,4,4 32,4,1,8 64,4,1,2 32,8,2,2"
)


@dataclass(frozen=True)
class Result:
    """One layer and batch row. density: keys read over keys, mean of the query heads; share: keys stored over those of a full
    cache; milliseconds are medians."""

    n: int
    per_head: bool
    density: float
    share: float
    stored_bytes: int
    index_bytes: int
    full_bytes: int
    step_ms: float
    full_cache_ms: float
    dense_ms: float
    error: float
    error_budget: float

    def __str__(self) -> str:
        kind = "per query head" if self.per_head else "per KV head"
        return (
            f"{self.n} keys, density {self.density:.3f} {kind}: stores {self.share:.3f} of a full cache "
            f"({self.stored_bytes / 2**20:.1f} of {self.full_bytes / 2**20:.1f} MiB, index {self.index_bytes / 2**20:.1f} MiB); step "
            f"{self.step_ms:.3f} ms, same plan over a full cache {self.full_cache_ms:.3f} ms, dense SDPA {self.dense_ms:.3f} ms "
            f"({self.dense_ms / self.step_ms:.1f}x)"
        )


@dataclass(frozen=True)
class Layer:
    """One decode step: q of the last token, k and v of all, a pattern per query head."""

    q: Tensor
    k: Tensor
    v: Tensor
    row: list[Pattern]
    kept: Kept

    @classmethod
    def random(cls, n: int, density: float, per_head: bool, device: str) -> Layer:
        torch.manual_seed(0)
        k, v = (torch.randn(1, KV_HEADS, n, WIDTH, device=device, dtype=_dtype(device)) for _ in range(2))
        q = torch.randn(1, Q_HEADS, 1, WIDTH, device=device, dtype=_dtype(device))
        row = _row(n, density, per_head)
        return cls(q, k, v, row, Kept.of(row, KV_HEADS, n + 1024))

    def call(self, per_head: bool) -> Call:
        """The same step over a full cache."""
        n, device = self.k.shape[2], self.k.device
        layout = compile_layout(self.row if per_head else self.row[:: Q_HEADS // KV_HEADS], n, device)
        return Call(self.q, self.k, self.v, layout, Spans.full(1, 1, n, device), SCALE)

    def store(self, programs: int) -> RaggedStore:
        """All tokens but the last, with work for so many programs per multiprocessor."""
        processors = torch.cuda.get_device_properties(self.k.device).multi_processor_count if self.k.is_cuda else 1
        store = RaggedStore(self.kept, self.kept.index(self.k.device, programs * processors), self.k, self.v)
        store.fill(self.k[:, :, :-1], self.v[:, :, :-1], [0], 0)
        return store

    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k[:, :, -1:], self.v[:, :, -1:]


def run(n: int, density: float, per_head: bool, device: str = "cuda") -> Result:
    """Measure one density at `n` keys."""
    layer = Layer.random(n, density, per_head, device)
    store, call, kept = layer.store(PROGRAMS), layer.call(per_head), layer.kept
    step = lambda: store.step(*layer.last(), SCALE)  # noqa: E731
    verdict = check_rows(call, *step(), rows=1)
    return Result(
        n=n,
        per_head=per_head,
        density=float(
            torch.stack([pattern.keep(torch.tensor(n - 1), torch.arange(n)).float().mean() for pattern in layer.row]).mean()
        ),
        share=kept.slots / (KV_HEADS * n),
        stored_bytes=store.nbytes,
        index_bytes=sum(t.nbytes for t in (*store.index.heads, *store.index[1:])),
        full_bytes=layer.k.nbytes + layer.v.nbytes,
        step_ms=_ms(step, device),
        full_cache_ms=_ms(lambda: attend(call.q, call.k, call.v, call.layout, spans=call.spans, scale=SCALE), device),
        dense_ms=_ms(lambda: _dense(layer.q, layer.k, layer.v, device), device, record=False),
        error=verdict.error,
        error_budget=verdict.budget,
    )


def tune(n: int, device: str, variants: list[Tuning], processes: int, seconds: float) -> None:
    """Print step times of choices that the kernel leaves open, at 10 % per KV head and per query head."""
    start = time.monotonic()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        problems = list(pool.map(partial(compile_variant, n, device), variants))
    print(f"[{time.monotonic() - start:5.1f} s] compiled and checked", flush=True)
    layers = [Layer.random(n, 0.1, per_head, device) for per_head in (False, True)]
    for tuning, problem in zip(variants, problems, strict=True):
        if problem or time.monotonic() - start > seconds:
            print(f"{tuning}: {problem or 'out of time'}", flush=True)
            continue
        times = [_ms(_tuned(layer, tuning), device, budget_ms=30.0) for layer in layers]
        print(f"[{time.monotonic() - start:5.1f} s] {tuning}: {times[0]:.4f} and {times[1]:.4f} ms", flush=True)


def compile_variant(n: int, device: str, tuning: Tuning) -> str | None:
    """Compile one choice and compare it with the oracle; why it cannot be used, or None."""
    try:
        for per_head in (False, True):
            layer = Layer.random(n, 0.1, per_head, device)
            check_rows(layer.call(per_head), *_tuned(layer, tuning)(), rows=1)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return None


def _tuned(layer: Layer, tuning: Tuning) -> Callable[[], tuple[Tensor, Tensor]]:
    from attnsieve.backends.triton.ragged import Step

    store = layer.store(tuning.programs)
    step = Step(layer.q, store.memory, store.index, SCALE, tuning)
    return lambda: step(*layer.last())


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _row(n: int, density: float, per_head: bool) -> list[Pattern]:
    """One pattern per query head, of the same size."""
    count = max(1, int(density * n) - WINDOW)
    group = 1 if per_head else Q_HEADS // KV_HEADS
    chosen = [columns(*torch.randperm(n)[:count].tolist()) | window(WINDOW) for _ in range(Q_HEADS // group)]
    return [chosen[h // group] for h in range(Q_HEADS)]


def _dense(q: Tensor, k: Tensor, v: Tensor, device: str) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _ms(run: Callable[[], object], device: str, record: bool = True, budget_ms: float = 200.0) -> float:
    return measure(recorded(run, device) if record else run, budget_ms, device=device).p50


def main() -> None:
    """Run all densities; results are appended as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=131072, help="keys")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--densities", default="0.1,0.05,0.02")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ragged.jsonl")
    parser.add_argument("--tune", action="store_true", help="only compare choices of the kernel")
    parser.add_argument("--tiles", default=TUNINGS, help="of --tune: keys,warps,ahead,programs separated by spaces")
    parser.add_argument("--processes", type=int, default=12, help="of --tune: that compile")
    parser.add_argument("--seconds", type=float, default=50.0, help="of --tune: no further choice is timed after so many")
    args = parser.parse_args()
    if args.tune:
        from attnsieve.backends.triton.shares import Tuning

        variants = [Tuning(*map(int, part.split(","))) for part in args.tiles.split()]
        tune(args.n, args.device, variants, args.processes, args.seconds)
        return
    for density in (float(text) for text in args.densities.split(",")):
        for per_head in (False, True):
            result = run(args.n, density, per_head, args.device)
            print(result, flush=True)
            with args.out.open("a") as file:
                file.write(
                    json.dumps(asdict(result) | {"device": device_name(torch.device(args.device))} | environment()) + "\n"
                )


if __name__ == "__main__":
    main()
