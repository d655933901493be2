"""Time tile shapes of the Triton kernels on the GPU: python benchmarks/tune.py forward --masks C,B --n 32768

Every variant is compiled in parallel first, then checked against the oracle, then timed. Prints one line a variant.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from attnsieve import Spans
from attnsieve.backends.call import Call
from attnsieve.backends.triton.forward import forward
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.schedule import schedule
from attnsieve.bench.check import check_rows
from attnsieve.bench.masks import mask
from attnsieve.bench.timing import measure
from attnsieve.layout import Layout


def inputs(name: str, n: int, width: int) -> Call:
    shared = name.startswith("dma")
    layout = mask(name, n, 8 if shared else 32, "cuda")
    torch.manual_seed(0)
    q = torch.randn(1, 32, n, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, n, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(1, 8, n, device="cuda") if shared else None
    return Call(q, k, v, layout, Spans.full(1, n, n, "cuda"), width**-0.5, bias)


def compile_variant(job: tuple[str, int, Tiles]) -> str | None:
    name, width, tiles = job
    try:
        forward(inputs(name, 2048, width), tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-200:]}"
    return None


def build_ms(call: Call, tiles: Tiles) -> float:
    """The schedule's own time, nothing cached."""
    positions = Geometry(call, tiles).positions
    layout = call.layout

    def build() -> object:
        fresh = Layout(layout.length, layout.end, layout.offset, blocks=layout.blocks, most_keys=layout.most_keys)
        return schedule(fresh, positions, tiles.keys)

    return measure(build, 50).p50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--masks", default="C,B,blocks-10,A,dma-1024")
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tiles", default="128,64,8,3", help="rows,keys,warps,stages separated by spaces")
    parser.add_argument("--out")
    args = parser.parse_args()
    variants = [Tiles(*map(int, part.split(","))) for part in args.tiles.split()]
    jobs = [(name, args.width, tiles) for name in args.masks.split(",") for tiles in variants]
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compile_variant, jobs), strict=True))
    rows = []
    for name in args.masks.split(","):
        call = inputs(name, args.n, args.width)
        best = build_ms(call, variants[0])
        print(f"{name} n {args.n} build {best:.3f} ms")
        for tiles in variants:
            if failures[name, args.width, tiles]:
                print(f"  {tiles}: {failures[name, args.width, tiles]}")
                continue
            try:
                out, lse = forward(call, tiles)
                verdict = check_rows(call, out, lse)
                times = measure(lambda call=call, tiles=tiles: forward(call, tiles), 100)
                row = {"mask": name, "n": args.n, "tiles": str(tiles), "ms": times.p50, "p20": times.p20, "p80": times.p80}
                rows.append(row | {"error": verdict.error, "budget": verdict.budget, "build_ms": best})
                print(f"  {tiles} {times.p50:.3f} ms  error {verdict.error:.1e} of {verdict.budget:.1e}", flush=True)
            except Exception as error:
                print(f"  {tiles}: {type(error).__name__} {str(error)[-300:]}", flush=True)
            call.layout.schedules.clear()
    if args.out:
        Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
