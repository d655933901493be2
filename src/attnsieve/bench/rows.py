"""Result rows: one JSON object a line, with all that is needed to repeat the measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "flash-attn-4")


@dataclass(frozen=True)
class Row:
    """One measurement of one operation. Times in milliseconds, memory in bytes.

    density: kept pairs over causal pairs (decode: over keys). speedup: the baseline's time over this one. efficiency: the
    baseline's time times density over this one, 1 is ideal. error: relative, against the float64 oracle.
    """

    op: str
    backend: str
    mask: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    dtype: str
    density: float
    ms_p20: float
    ms_p50: float
    ms_p80: float
    includes_mask_building: bool
    baseline: str | None
    baseline_ms_p50: float | None
    error: float | None
    error_budget: float | None
    peak_bytes: int

    @property
    def speedup(self) -> float | None:
        return None if self.baseline_ms_p50 is None else self.baseline_ms_p50 / self.ms_p50

    @property
    def efficiency(self) -> float | None:
        return None if self.speedup is None else self.speedup * self.density

    def __str__(self) -> str:
        against = "" if self.speedup is None else f", {self.speedup:.1f}x {self.baseline}, efficiency {self.efficiency:.2f}"
        return (
            f"{self.op} {self.backend} {self.mask} {self.q_len}x{self.kv_len} density {self.density:.4f}: "
            f"{self.ms_p50:.3f} ms ({self.ms_p20:.3f} to {self.ms_p80:.3f}){against}"
        )


def write(rows: Iterable[Row], path: Path) -> None:
    """Append rows as JSON lines, each with the environment it was measured in."""
    here = environment()
    with path.open("a") as file:
        for row in rows:
            derived = {"speedup": row.speedup, "efficiency": row.efficiency}
            file.write(json.dumps(asdict(row) | derived | here) + "\n")


def environment() -> dict[str, object]:
    """Device, versions, commit, command and date."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": sys.version.split()[0], "cuda": torch.version.cuda} | _versions(),
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
