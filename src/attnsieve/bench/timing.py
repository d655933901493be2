"""Timing on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Calls this long vary little and cost much: three repeats do.
_LONG_MS = 200.0


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


def measure(run: Callable[[], object], budget_ms: float = 200.0, cold: bool = True, device: str = "cuda") -> Times:
    """Times of `run` after a warm-up, by device events on a GPU and by the clock on a CPU. `cold` overwrites a GPU's L2 cache
    before every repeat.

    On a GPU repeats are queued without waiting, so the host's part shows only where it is longer than the device's.
    """
    run()
    if torch.device(device).type == "cpu":
        once = _clock(run, 1)[0]
        times = sorted(_clock(run, min(50, max(3, int(budget_ms / max(once, 1e-3))))))
    else:
        flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device) if cold else None
        once = _queue(run, flush, 1)[0]
        fewest = 5 if once < _LONG_MS else 3
        times = sorted(_queue(run, flush, min(100, max(fewest, int(budget_ms / max(once, 1e-3))))))
    return Times(*(times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8)))


def recorded(run: Callable[[], object], device: str = "cuda") -> Callable[[], object]:
    """`run` as a CUDA graph, so that a short call's time is the device's; on a CPU `run` itself."""
    if torch.device(device).type == "cpu":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _clock(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _queue(run: Callable[[], object], flush: torch.Tensor | None, repeats: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in marks:
        if flush is not None:
            flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(stop)) for start, stop in marks]
