"""Time tile shapes of the Triton kernels on the GPU.

    python benchmarks/tune.py forward --masks C,B --n 32768 --tiles "128,64,8,3 128,128,8,2"

Operations: forward, dq, dkv (one pass of the backward each), decode. Every variant is compiled and checked against the oracle
on a short call first, several at a time; then timed. Prints one line a variant.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
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
from attnsieve.bench.check import check_gradients, check_rows
from attnsieve.bench.masks import mask
from attnsieve.bench.timing import measure
from attnsieve.layout import Layout


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


def compile_variant(job: tuple[str, str, int, int, Tiles]) -> str | None:
    """Compile one variant and check it; the reason why it cannot be used, or None."""
    op, name, width, stretch, tiles = job
    gradients.STRETCH_ROWS = stretch
    try:
        call = inputs(name, 2048, width)
        if op == "forward":
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
    layout = call.layout

    def build() -> object:
        fresh = Layout(layout.length, layout.end, layout.offset, blocks=layout.blocks, most_keys=layout.most_keys)
        return schedule(fresh, positions, tiles.keys)

    return measure(build, 50).p50


def host_us(run: object, repeats: int = 50) -> float:
    """Host time of queueing one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    spent = (time.perf_counter() - start) / repeats * 1e6
    torch.cuda.synchronize()
    return spent


def time_decode(names: list[str], n: int, width: int) -> None:
    """Decode one query against n keys."""
    for name in names:
        call = inputs(name, n, width, q_len=1)
        verdict = check_rows(call, *decode(call), rows=1)
        times = measure(lambda call=call: decode(call), 50)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode(call)
        replay = measure(graph.replay, 50)
        kept = float(call.layout.keep(0, 0, torch.tensor(n - 1).cuda(), torch.arange(n).cuda()).float().mean())
        print(
            f"decode {name} n {n} kept {kept:.4f}: {times.p50:.4f} ms, in a graph {replay.p50:.4f} ms, error {verdict.error:.1e}"
        )


def main() -> None:
    """Parse arguments, compile in parallel, time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("op", choices=["forward", "dq", "dkv", "decode"])
    parser.add_argument("--masks", default="C,B,blocks-10,A,dma-1024")
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--stretch", type=int, default=tuning.STRETCH_ROWS)
    parser.add_argument("--tiles", default="128,64,8,3", help="rows,keys,warps,stages separated by spaces")
    parser.add_argument("--out")
    args = parser.parse_args()
    names = args.masks.split(",")
    if args.op == "decode":
        return time_decode(names, args.n, args.width)
    gradients.STRETCH_ROWS = args.stretch
    variants = [Tiles(*map(int, part.split(","))) for part in args.tiles.split()]
    jobs = [(args.op, name, args.width, args.stretch, tiles) for name in names for tiles in variants]
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compile_variant, jobs), strict=True))
    rows = []
    for name in names:
        call = inputs(name, args.n, args.width)
        both = None if args.op == "forward" else Pass(call)
        for tiles in variants:
            failure = failures[args.op, name, args.width, args.stretch, tiles]
            if failure:
                print(f"{args.op} {name} {tiles}: {failure}")
                continue
            run = (
                (lambda call=call, tiles=tiles: forward(call, tiles))
                if both is None
                else (lambda both=both, tiles=tiles: getattr(both, args.op)(tiles))
            )
            try:
                times = measure(run, 60)
            except Exception as error:
                print(f"{args.op} {name} {tiles}: {type(error).__name__} {str(error)[-300:]}", flush=True)
                continue
            row = {
                "op": args.op,
                "mask": name,
                "n": args.n,
                "tiles": str(tiles),
                "ms": times.p50,
                "p20": times.p20,
                "p80": times.p80,
            }
            rows.append(row | {"build_ms": build_ms(call, tiles), "host_us": host_us(run)})
            print(
                f"{args.op} {name} {tiles} {times.p50:.3f} ms, build {rows[-1]['build_ms']:.3f} ms, host {rows[-1]['host_us']:.0f} us",
                flush=True,
            )
            call.layout.schedules.clear()
    if args.out:
        with Path(args.out).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
