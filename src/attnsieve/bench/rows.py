"""Result rows: one JSON object a line, with all that is needed to repeat the measurement."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnsieve.bench.case import Case
from attnsieve.bench.check import Verdict
from attnsieve.bench.timing import Times
from attnsieve.device import device_name
from attnsieve.environment import environment
from attnsieve.errors import require
from attnsieve.files import append_lines, utf8


@dataclass(frozen=True)
class Dense:
    """The fastest dense kernel for a shape, which rows are compared with."""

    name: str
    ms: float


@dataclass(frozen=True)
class Row:
    """One measurement of one operation. Times in milliseconds, memory in bytes.

    density: kept pairs over causal pairs (decode: over keys), None where memory ran out while it was measured. speedup: the
    baseline's time over this one. efficiency: the baseline's time times density over this one, 1 is ideal. error: relative, against
    the float64 oracle. includes_mask_building: whether the time holds building what the backend derives from a layout, and DMA's
    selection. device: as costs are kept by. shape: the model's name. failure: why there are no times. work: amounts of work by kind,
    what costs are fitted to.
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
    density: float | None
    ms_p20: float | None
    ms_p50: float | None
    ms_p80: float | None
    includes_mask_building: bool
    baseline: str | None
    baseline_ms_p50: float | None
    error: float | None
    error_budget: float | None
    peak_bytes: int | None
    device: str
    shape: str | None = None
    work: dict[str, float] | None = None
    failure: str | None = None

    @classmethod
    def of(
        cls,
        op: str,
        backend: str,
        case: Case,
        times: Times | None,
        peak: int | None,
        *,
        density: float | None,
        building: bool,
        baseline: Dense | None = None,
        verdict: Verdict | None = None,
        work: dict[str, float] | None = None,
    ) -> Row:
        """What was measured of a case. peak: memory in bytes; building: as includes_mask_building; times are None where memory ran
        out."""
        return cls(
            op=op,
            backend=backend,
            mask=case.label,
            batch=case.batch,
            q_heads=case.q_heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            q_len=case.n if case.q_len is None else case.q_len,
            kv_len=case.n,
            dtype=str(case.dtype).removeprefix("torch."),
            density=density,
            ms_p20=None if times is None else times.p20,
            ms_p50=None if times is None else times.p50,
            ms_p80=None if times is None else times.p80,
            includes_mask_building=building,
            baseline=None if baseline is None else baseline.name,
            baseline_ms_p50=None if baseline is None else baseline.ms,
            error=None if verdict is None else verdict.error,
            error_budget=None if verdict is None else verdict.budget,
            peak_bytes=peak,
            device=device_name(torch.device(case.device)),
            shape=case.shape,
            work=work,
            failure=None if times else "out of memory",
        )

    @property
    def speedup(self) -> float | None:
        return None if self.baseline_ms_p50 is None or self.ms_p50 is None else self.baseline_ms_p50 / self.ms_p50

    @property
    def efficiency(self) -> float | None:
        """Of attention alone: most of a whole model's time is not its attention."""
        return None if self.speedup is None or self.density is None or self.op == "ttft" else self.speedup * self.density

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows from it, to six digits."""
        plain = asdict(self) | {"speedup": self.speedup, "efficiency": self.efficiency}
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in plain.items()}

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.op} {self.backend} {self.mask} {self.batch} x {self.q_len}: {self.failure}"
        against = "" if self.speedup is None else f", {self.speedup:.2f}x {self.baseline}"
        against += "" if self.efficiency is None else f", efficiency {self.efficiency:.2f}"
        density = "unknown" if self.density is None else f"{self.density:.4f}"
        building = " with mask building" if self.includes_mask_building else ""
        return (
            f"{self.op} {self.backend} {self.mask} {self.q_len}x{self.kv_len} density {density}{building}: "
            f"{self.ms_p50:.3f} ms ({self.ms_p20:.3f} to {self.ms_p80:.3f}){against}"
        )


def check_target(path: Path) -> None:
    """Raise UserError where `path` holds rows of another kind, which would no longer be readable among these."""
    if path.is_file():
        with path.open("rb") as raw, utf8(raw, path) as file:
            first = file.readline()
        require(not first.strip() or '"op":' in first, f"{path} holds no rows of benchmarks: choose another file")


def write(rows: Iterable[Row], path: Path) -> None:
    """Append rows as JSON lines, each with the environment it was measured in."""
    here = {"threads": torch.get_num_threads()} | environment()
    append_lines(path, "".join(json.dumps(row.to_json() | here) + "\n" for row in rows))


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of files that `write` wrote, one file after the other."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
