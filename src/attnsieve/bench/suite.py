"""A set of measurements: every mask of every shape and length on every backend, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from attnsieve.attention import BACKENDS
from attnsieve.bench import dense, kernels
from attnsieve.bench.case import Case
from attnsieve.bench.check import WrongResult
from attnsieve.bench.masks import check_mask
from attnsieve.bench.rows import Dense, Row
from attnsieve.bench.shapes import Shape
from attnsieve.errors import UserError, require

OPS = ("prefill", "decode", "forward_backward", "layout", "select")
_COMPARED = {"prefill": kernels.prefill, "decode": kernels.decode, "forward_backward": kernels.forward_backward}


@dataclass(frozen=True)
class Skipped:
    """A measurement that could not be made, and why."""

    mask: str
    n: int
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"skipped {self.backend} {self.mask} at {self.n}: {self.reason}"


@dataclass(frozen=True)
class Suite:
    """What to measure. masks as in `masks.mask`, a + after a name for one mask per KV group; baselines as in `dense.KERNELS`.

    budget_ms: how long a measurement is repeated, warm-up not counted.
    """

    op: str
    masks: Sequence[str]
    shapes: Sequence[Shape]
    lengths: Sequence[int]
    backends: Sequence[str]
    baselines: Sequence[str]
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    batch: int = 1
    budget_ms: float = 200.0

    def rows(self) -> Iterator[Row | Skipped]:
        """Rows as they are measured, dense attention first; sparse rows are compared with its fastest kernel.

        Raises `WrongResult` where a kernel fails the oracle, UserError for unknown operations, backends, baselines and masks.
        """
        self._check()
        for shape in self.shapes:
            for n in self.lengths:
                yield from self._of_length(shape, n)

    def _check(self) -> None:
        known = ("auto", *BACKENDS, *kernels.FLEX)
        require(self.op in OPS, f"unknown operation {self.op!r}; choose from {', '.join((*OPS, 'ttft'))}")
        for backend in self.backends:
            require(backend in known, f"unknown backend {backend!r}; choose from {', '.join(known)}")
        for baseline in self.baselines:
            dense.attention(baseline)
        for mask in self.masks:
            check_mask(mask.removesuffix("+"))

    def _of_length(self, shape: Shape, n: int) -> Iterator[Row | Skipped]:
        cases = [Case.of(mask, n, shape, self.dtype, self.device, self.batch) for mask in self.masks]
        measured = []
        for baseline in self.baselines if self.op in _COMPARED else ():
            for row in _or_skipped(
                partial(kernels.dense_rows, self.op, cases[0], [baseline], self.budget_ms), cases[0], baseline
            ):
                measured += [row] if isinstance(row, Row) else []
                yield row
        for case in cases:
            for backend in self.backends:
                measure = partial(self._measure, case, backend, kernels.fastest(measured))
                yield from _or_skipped(measure, case, backend)

    def _measure(self, case: Case, backend: str, baseline: Dense | None) -> Iterable[Row]:
        if self.op == "layout":
            return kernels.layout(case, backend, self.budget_ms)
        if self.op == "select":
            return kernels.select(case, self.budget_ms)
        return _COMPARED[self.op](case, backend, baseline, self.budget_ms)


def _or_skipped(measure: Callable[[], Iterable[Row]], case: Case, backend: str) -> Iterator[Row | Skipped]:
    try:
        yield from measure()
    except UserError as error:
        yield Skipped(case.label, case.n, backend, str(error))
    except torch.OutOfMemoryError:
        yield Skipped(case.label, case.n, backend, "out of memory")
    except Exception as error:
        # FlexAttention's compilers fail in their own ways; the other rows are still to be measured.
        if backend not in kernels.FLEX or isinstance(error, WrongResult):
            raise
        yield Skipped(case.label, case.n, backend, f"{type(error).__name__}: {str(error).strip()[-300:]}")
