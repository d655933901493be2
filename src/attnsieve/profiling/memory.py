"""How much memory profiling needs, and refusing up front when it is not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint


def estimate_memory(fingerprint: Fingerprint, pcl: int, lengths: Sequence[int], *, maps: bool = True) -> int:
    """Bytes of the sums: float32 maps [layers, heads, pcl, pcl] and two float64 vectors of each probed length per head."""
    heads = fingerprint.layers * fingerprint.heads
    return heads * (4 * pcl * pcl * maps + 16 * sum(lengths))


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`, control-group limits included; None where that cannot be known."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [value for value in (_physical(), _group()) if value is not None]
    return min(known, default=None)


def check_memory(needed: int, limit: int | None, device: torch.device | str = "cpu") -> None:
    """Raise UserError if `needed` bytes exceed `limit`, by default nine tenths of what is available on `device`."""
    available = available_memory(device)
    if limit is None:
        limit = None if available is None else available * 9 // 10
    require(
        limit is None or needed <= limit,
        f"profiling needs {needed / 2**30:.2f} GiB for its sums on {device}, the limit is {(limit or 0) / 2**30:.2f} GiB: "
        "lower the capture length, probe shorter lengths, capture without maps, or raise memory_limit",
    )


def _physical() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _group() -> int | None:
    """What the control group of a container still allows."""
    root = Path("/sys/fs/cgroup")
    try:
        return int((root / "memory.max").read_text()) - int((root / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
