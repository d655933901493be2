"""Timing on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

    @classmethod
    def of(cls, times: Sequence[float]) -> Times:
        """From repeats, in any order."""
        ordered = sorted(times)
        return cls(*(ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)))

    def each(self, parts: int) -> Times:
        """Of one of as many equal parts that were timed together."""
        return Times(self.p20 / parts, self.p50 / parts, self.p80 / parts)


def measure(run: Callable[[], object], budget_ms: float = 200.0, cold: bool = True, device: str = "cuda") -> Times:
    """Times of `run` after a warm-up, by device events on a GPU and by the clock on a CPU. `cold` fills a GPU's L2 cache with other
    data before every repeat; they are read, as a model's weights are: what was written would have to be written back meanwhile.

    On a GPU repeats are queued without waiting, so the host's part shows only where it is longer than the device's.
    """
    run()
    if torch.device(device).type == "cpu":
        once = _clock(run, 1)[0]
        return Times.of(_clock(run, min(50, max(3, int(budget_ms / max(once, 1e-3))))))
    flush = torch.zeros(64 * 2**20, dtype=torch.int32, device=device) if cold else None
    once = _queue(run, flush, 1)[0]
    fewest = 5 if once < _LONG_MS else 3
    return Times.of(_queue(run, flush, min(100, max(fewest, int(budget_ms / max(once, 1e-3))))))


def measure_with_peak(run: Callable[[], object], device: str, budget_ms: float) -> tuple[Times, int | None]:
    """Times, and on a GPU the memory in use at the peak of one run, in bytes."""
    peak = peak_of(run, device)
    return measure(run, budget_ms, device=device), peak


def peak_of(run: Callable[[], object], device: str) -> int | None:
    """On a GPU the memory in use at the peak of one run, in bytes."""
    if torch.device(device).type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


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
            flush.sum()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(stop)) for start, stop in marks]
