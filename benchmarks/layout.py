"""Time building the Triton schedule of a layout on the GPU, step by step.

    python benchmarks/layout.py
    python benchmarks/layout.py --masks B,C --n 32768,131072 --table 0

For each mask: read back as layouts that serve many calls are; as if chosen from the input, which must not wait for the device (it
raises where it would); and replayed from a CUDA graph, which is what the GPU takes. `host` is the time to queue one build as chosen.
Then the kernels of one build, by time. Several processes compile the kernels first, and check attention against the oracle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from tune import host_us, inputs

from attnsieve.backends.call import Call
from attnsieve.backends.triton.forward import forward
from attnsieve.backends.triton.geometry import Geometry
from attnsieve.backends.triton.schedule import schedule
from attnsieve.backends.triton.tuning import forward_tiles
from attnsieve.bench.check import check_rows
from attnsieve.bench.timing import measure
from attnsieve.layout import Layout

# Not a multiple of any tile, but of 16: then most kernels are those of longer calls.
_CHECKED_LENGTH = 4080
_BUILDS = 5


def fresh(layout: Layout, chosen: bool) -> Layout:
    """Nothing remembered; as one that serves a single call, or as one that the host may read."""
    known = layout.most_keys is None and chosen
    return replace(layout, passing=chosen, windows=known)


def builder(call: Call, chosen: bool) -> Callable[[], object]:
    """Builds what prefill of `call` needs."""
    tiles = forward_tiles(call)
    positions = Geometry(call, tiles).positions
    return lambda: schedule(fresh(call.layout, chosen), positions, tiles.keys)


def check(job: tuple[str, int, int]) -> None:
    """Compile what a mask needs. At the short length also check attention on both kinds of schedule, and on one built in a graph."""
    name, n, width = job
    call = inputs(name, n, width)
    both = [replace(call, layout=fresh(call.layout, chosen)) for chosen in (False, True)]
    results = [forward(one, forward_tiles(one)) for one in both]
    torch.cuda.synchronize()
    if n != _CHECKED_LENGTH:
        return
    for one, result in zip(both, results, strict=True):
        check_rows(one, *result)
    one, graph = replace(call, layout=fresh(call.layout, True)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = forward(one, forward_tiles(one))
    graph.replay()
    check_rows(one, out, lse)


def without_waiting(run: Callable[[], object]) -> None:
    """Raises where `run` waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernels(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds of the kernels of one run, longest first; copies and fills included."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(_BUILDS):
            run()
        torch.cuda.synchronize()
    rows = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    times = [(event.key, event.count / _BUILDS, event.self_device_time_total / _BUILDS) for event in rows]
    return sorted(times, key=lambda row: -row[2])


def report(name: str, n: int, width: int, table: int) -> None:
    """One row, and the longest `table` kernels of a build."""
    call = inputs(name, n, width)
    read, chosen = builder(call, False), builder(call, True)
    chosen()
    without_waiting(chosen)
    times = [measure(run, 60).p50 for run in (read, chosen, in_graph(chosen))]
    attention = measure(lambda: forward(call, forward_tiles(call)), 60).p50
    found = kernels(read)
    spent, launches = sum(row[2] for row in found) / 1e3, sum(row[1] for row in found)
    host = host_us(chosen, times[1])
    line = f"{name:10}{n:8}{times[0]:9.3f}{times[1]:9.3f}{times[2]:9.3f}{host:8.0f}{launches:9.0f}{spent:9.3f}{attention:9.2f}"
    tqdm.write(f"{line}{times[0] / attention:8.1%}{times[1] / attention:8.1%}")
    for kernel, count, microseconds in found[:table]:
        tqdm.write(f"    {microseconds:9.1f} us  {count:4.1f} x  {kernel[:90]}")


def main() -> None:
    """Parse arguments, check, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", default="blocks-10,B,C,dma-1024")
    parser.add_argument("--n", default="131072", help="lengths separated by commas")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--table", type=int, default=12, help="kernels to show of each build")
    args = parser.parse_args()
    names, lengths = args.masks.split(","), [int(n) for n in args.n.split(",")]
    jobs = [(name, n, args.width) for n in (_CHECKED_LENGTH, *lengths) for name in names]
    with ProcessPoolExecutor(min(8, len(jobs)), get_context("spawn")) as pool:
        list(tqdm(pool.map(check, jobs), desc="checked", total=len(jobs), leave=False))
    columns = ("read", "chosen", "graph", "host us", "launches", "kernels", "attention")
    tqdm.write(f"{'mask':10}{'n':>8}" + "".join(f"{column:>{max(9, len(column))}}" for column in columns) + "    share of both")
    for n in lengths:
        for name in names:
            report(name, n, args.width, args.table if n == max(lengths) else 0)


if __name__ == "__main__":
    main()
