"""What choosing keys costs beside the attention it is for: `python benchmarks/choosing.py --seconds 60`.

One JSON line for each length and dynamic pattern: milliseconds of `choose`, of the attention with what was chosen, with and without
what the backend derives from a layout, density, and the work that costs are fitted to. 32 query and 8 KV heads of width 128, batch 1.
Queries resemble their neighbours and keys theirs, as in text; scores have a standard deviation of 4. With --random all are
independent, scores have a standard deviation of 1, and nearly every key is needed. --warm compiles in that many processes first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from attnsieve import Pattern, UserError, attend
from attnsieve.backends.call import Call
from attnsieve.backends.whole import whole_spans
from attnsieve.bench.case import DENSE, Case
from attnsieve.bench.timing import measure
from attnsieve.device import device_name
from attnsieve.environment import environment
from attnsieve.layout import Blocks, Layout
from attnsieve.selection import choose
from attnsieve.selection.cost import work

HEADS, KV_HEADS, WIDTH = 32, 8, 128
GUARD = "sink(4) | window(128) | "
CHOICES = [
    "vertical_slash(mass=0.9)",
    "probed_keys(mass=0.9)",
    "probed_blocks(mass=0.9)",
    "antidiagonal_blocks(mass=0.9, block=128)",
    'vertical_slash(mass=0.9, share="kv")',
    "vertical_slash(mass=0.9, strided=64)",
    "probed_blocks(mass=0.9, block=128, rows=1)",
    "probed_keys(mass=0.9, block=256, rows=4)",
    'probed_keys(mass=0.9, block=256, rows=4, share="kv")',
    "antidiagonal_blocks(mass=0.9, block=128, stride=16)",
    "dam_online(mu=0.5)",
    "voted_keys(4096)",
    "pooled_blocks(block=128)",
    "top_blocks(100, block=128)",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--patterns", default=";".join(CHOICES), help="divided by ;")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--warm", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of every choice by time")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="append the lines there, with their environment")
    arguments = parser.parse_args()
    start, patterns = time.monotonic(), arguments.patterns.split(";")
    if arguments.warm:
        with ProcessPoolExecutor(arguments.warm, get_context("spawn")) as pool:
            list(pool.map(compile_one, patterns))
    for n in map(int, arguments.lengths.split(",")):
        q, k, v = inputs(n, arguments.device, arguments.random)
        for pattern in patterns:
            if time.monotonic() - start > arguments.seconds:
                print(f"out of time, not measured: {n} {pattern}")
                continue
            try:
                row = measured(pattern, q, k, v)
                line = json.dumps(row)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row | environment()) + "\n")
            except (torch.OutOfMemoryError, UserError) as error:
                line = f"out of memory: {n} {pattern}: {error}"
            print(f"[{time.monotonic() - start:5.1f} s]", line, flush=True)
            if arguments.kernels:
                list_kernels(pattern, q, k)


def compile_one(pattern: str) -> None:
    """Run it short, which compiles most of its kernels into Triton's cache on disk."""
    q, k, v = inputs(2048, "cuda")
    attend(q, k, v, choose(row_of(pattern), q, k))


def inputs(n: int, device: str, random: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 q [1, 32, n, 128], k and v [1, 8, n, 128]."""
    case = Case(DENSE if random else CHOICES[0], n, device=device, q_heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH)
    return case.inputs()


def row_of(pattern: str) -> list[Pattern]:
    return [Pattern.parse(GUARD + pattern)] * HEADS


def measured(pattern: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, object]:
    """One line."""
    row, device = row_of(pattern), q.device.type
    if q.is_cuda:
        torch.cuda.empty_cache()
    choose_ms, choose_gib = timed(lambda: choose(row, q, k), device)
    layout = choose(row, q, k)
    attention_ms, attention_gib = timed(lambda: attend(q, k, v, layout), device)
    # Lists of single keys are as large as the layout: beside those that are timed there may be no room for more.
    layout.schedules.clear()
    both_ms, _ = timed(lambda: attend(q, k, v, replace(layout)), device)
    times = {"choose_ms": choose_ms, "attention_ms": attention_ms, "attention_and_lists_ms": both_ms}
    peaks = {"choose_peak_gib": choose_gib, "attention_peak_gib": attention_gib}
    density = round(float(of_first_head(layout).density().mean()), 4)
    amounts = work(row, Call(q, k, v, layout, whole_spans(q, k), q.shape[-1] ** -0.5))
    what = {"device": device_name(q.device), "pattern": pattern, "kv_len": k.shape[2]}
    return what | times | {"density_of_head_0": density} | peaks | {"work": amounts}


def timed(run: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Milliseconds, and on a GPU all memory in use at the peak, in GiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = round(measure(run, 20.0, device=device).p50, 3)
    return ms, round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else None


def of_first_head(layout: Layout) -> Layout:
    """Counting all heads would take longer than the rest."""
    offset, blocks = layout.offset, layout.blocks
    return Layout(
        layout.length,
        layout.end[:, :1],
        None if offset is None else offset[:, :1],
        blocks=None if blocks is None else Blocks(blocks.rows, blocks.keys, blocks.count[:, :1], blocks.index[:, :1]),
    )


def list_kernels(pattern: str, q: Tensor, k: Tensor) -> None:
    from torch.profiler import ProfilerActivity, profile

    row = row_of(pattern)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        choose(row, q, k)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60))


if __name__ == "__main__":
    main()
