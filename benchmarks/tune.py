"""Time tile shapes of the Triton kernels on the GPU.

    python benchmarks/tune.py forward
    python benchmarks/tune.py forward --masks blocks-10 --n 131072 --tiles "128,64,8,3 128,128,8,2"
    python benchmarks/tune.py decode --masks "columns-10,columns-10+,dense()" --n 131072,32768

Operations: forward, dq, dkv (one pass of the backward each), decode (one query; --tiles are keys, warps, tiles ahead, programs on a
multiprocessor). Every variant is compiled and checked against the oracle on a short call first, several at a time; then timed.
Prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from attnsieve import Spans
from attnsieve.backends.call import Call
from attnsieve.backends.triton import gradients, tuning
from attnsieve.backends.triton.decode import decode
from attnsieve.backends.triton.forward import forward
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.schedule import schedule
from attnsieve.backends.triton.shares import Tuning
from attnsieve.bench.check import check_gradients, check_rows
from attnsieve.bench.dense import KERNELS
from attnsieve.bench.kernels import density
from attnsieve.bench.masks import mask
from attnsieve.bench.timing import measure, recorded

# For heads 128 wide: the loops spill little or nothing (compiled for sm_90), K and V of all stages fit into shared memory.
CANDIDATES = {
    "forward": "128,64,8,2,128 64,64,4,2 128,64,8,3 128,128,8,2 64,64,4,3",
    "dq": "128,64,8,2 64,64,4,2 64,64,4,3 128,32,8,3",
    "dkv": "64,64,4,2 64,64,8,2 128,64,8,2 64,128,8,2",
    "decode": "32,4,2,4 32,4,3,3 32,4,2,5 32,2,2,5 64,8,2,2 64,4,2,2",
}


def inputs(name: str, n: int, width: int, q_len: int | None = None) -> Call:
    """bf16, 32 query and 8 KV heads; DMA masks, and masks named with a +, are shared by a group."""
    shared = name.startswith("dma") or name.endswith("+")
    layout = mask(name.rstrip("+"), n, 8 if shared else 32, "cuda")
    q_len = n if q_len is None else q_len
    torch.manual_seed(0)
    q = torch.randn(1, 32, q_len, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, n, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(1, 8, n, device="cuda") if name.startswith("dma") else None
    return Call(q, k, v, layout, Spans.full(1, q_len, n, "cuda"), width**-0.5, bias)


class Pass:
    """One pass of the backward on fixed inputs."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.out, self.lse = forward(call, tuning.forward_tiles(call))
        self.d_out = torch.randn_like(self.out)
        self.delta = gradients.row_sums(call, self.out, self.lse, self.d_out, None)
        self.columns = gradients.row_columns(call, self.lse, self.delta)

    def dq(self, tiles: Tiles) -> Tensor:
        return gradients.query_gradient(self.call, self.d_out, self.lse, self.delta.clone(), None, tiles)

    def dkv(self, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor | None]:
        return gradients.key_gradients(self.call, self.d_out, self.columns, tiles)


def compile_variant(job: tuple[str, str, int, int, Tiles | Tuning]) -> str | None:
    """Compile one variant and check it; the reason why it cannot be used, or None."""
    op, name, width, stretch, tiles = job
    gradients.STRETCH_ROWS = stretch
    try:
        call = inputs(name, 2048, width, q_len=1 if op == "decode" else None)
        if isinstance(tiles, Tuning):
            check_rows(call, *decode(call, tiles), rows=1)
        elif op == "forward":
            check_rows(call, *forward(call, tiles))
        else:
            both = Pass(call)
            grads = (both.dq(tiles), None, None, None) if op == "dq" else (None, *both.dkv(tiles))
            check_gradients(call, both.d_out, grads)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return None


def build_ms(call: Call, tiles: Tiles) -> float:
    """The schedule's own time, nothing cached."""
    positions = Geometry(call, tiles).positions
    return measure(lambda: schedule(replace(call.layout), positions, tiles.keys), 50).p50


def host_us(run: Callable[[], object], ms: float) -> float:
    """Host time of queueing one call that takes `ms`."""
    repeats = max(3, min(50, int(20 / ms)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    spent = (time.perf_counter() - start) / repeats * 1e6
    torch.cuda.synchronize()
    return spent


def time_decode(name: str, n: int, width: int, variants: list[Tuning]) -> Iterator[dict[str, object]]:
    """One row a variant: one query against n keys, replayed in a graph, beside dense attention by cuDNN; and the rate at which
    the keys of each KV group's union are read."""
    call = inputs(name, n, width, q_len=1)
    last, keys = torch.tensor([n - 1], device="cuda"), torch.arange(n, device="cuda")
    kept = call.layout.dense(last, keys)[0, :, 0]
    union = int(kept.view(8, -1, n).any(1).sum())
    dense = measure(recorded(lambda: KERNELS["cudnn"](call)), 50).p50
    print(f"{name} {n}: {union / (8 * n):.3f} of the keys are kept by some head of a group; cuDNN, dense, {dense:.4f} ms")
    for shares in variants:
        check_rows(call, *decode(call, shares), rows=1)
        times = measure(recorded(lambda shares=shares: decode(call, shares)), 50)
        row = {"op": "decode", "mask": name, "n": n, "tiles": str(shares), "ms": times.p50, "p20": times.p20, "p80": times.p80}
        row |= {"union": union / (8 * n), "speedup": dense / times.p50, "gb_per_s": union * 4 * width / times.p50 / 1e6}
        shape = f"{shares.keys} keys, {shares.warps} warps, {shares.ahead} ahead, {shares.programs} programs"
        print("    {0:42}{ms:9.4f} ms{speedup:8.2f} x{gb_per_s:8.0f} GB/s".format(shape, **row), flush=True)
        yield row


def runner(op: str, call: Call) -> Callable[[Tiles], object]:
    """One pass with given tiles on fixed inputs."""
    return (lambda tiles: forward(call, tiles)) if op == "forward" else getattr(Pass(call), op)


def time_variants(op: str, name: str, n: int, width: int, variants: list[Tiles]) -> Iterator[dict[str, object]]:
    """One row a variant; prints it as a line of the table."""
    call = inputs(name, n, width)
    run = runner(op, call)
    passes = {"forward": 2, "dq": 3, "dkv": 4}[op]
    flops = 2 * passes * width * 32 * density(call.layout, n, n) * n * (n + 1) / 2
    for tiles in variants:
        try:
            times = measure(lambda tiles=tiles: run(tiles), 60)
        except Exception as error:
            print(f"{name:12}{n:8}  {tiles}: {type(error).__name__} {str(error)[-200:]}", flush=True)
            continue
        row = {"op": op, "mask": name, "n": n, "tiles": str(tiles), "ms": times.p50, "p20": times.p20, "p80": times.p80}
        row |= {"tflops": flops / times.p50 / 1e9, "build_ms": build_ms(call, tiles)}
        row["host_us"] = host_us(lambda tiles=tiles: run(tiles), times.p50)
        shape = (
            f"{tiles.rows:4} x {tiles.keys:3}, {tiles.warps} warps, {tiles.stages} stages, {tiles.registers or 255:3} registers"
        )
        print(
            "{0:12}{1:8}  {shape}{ms:10.3f}{tflops:9.0f}{build_ms:9.3f}{host_us:8.0f}".format(name, n, shape=shape, **row),
            flush=True,
        )
        yield row
        call.layout.schedules.clear()


def main() -> None:
    """Parse arguments, compile in parallel, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["forward", "dq", "dkv", "decode"])
    parser.add_argument("--masks", default="blocks-10,A,B,C")
    parser.add_argument("--n", default="32768", help="lengths separated by commas")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--stretch", type=int, default=tuning.STRETCH_ROWS)
    parser.add_argument("--tiles", help="rows,keys,warps,stages[,registers] separated by spaces; of decode see above")
    parser.add_argument("--out")
    args = parser.parse_args()
    names, lengths = args.masks.split(","), [int(n) for n in args.n.split(",")]
    gradients.STRETCH_ROWS = args.stretch
    kind = Tuning if args.op == "decode" else Tiles
    variants = [kind(*map(int, part.split(","))) for part in (args.tiles or CANDIDATES[args.op]).split()]
    jobs = [(args.op, name, args.width, args.stretch, tiles) for name in names for tiles in variants]
    with ProcessPoolExecutor(min(14, len(jobs)), get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compile_variant, jobs), strict=True))
    for job, failure in failures.items():
        if failure:
            print(f"{job[1]} {job[-1]}: {failure}")
    rows = []
    if args.op != "decode":
        print(f"{'mask':12}{'n':>8}  {'rows x keys':43}{'ms':>10}{'TFLOP/s':>9}{'build ms':>9}{'host us':>8}")
    for n in lengths:
        for name in names:
            good = [tiles for tiles in variants if not failures[args.op, name, args.width, args.stretch, tiles]]
            time_all = time_decode if args.op == "decode" else partial(time_variants, args.op)
            rows += time_all(name, n, args.width, good)
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
