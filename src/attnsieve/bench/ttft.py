"""Time to first token and peak memory of whole models with random weights: dense beside plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from attnsieve.bench import kernels
from attnsieve.bench.case import DENSE, Case
from attnsieve.bench.check import Verdict, check_rows
from attnsieve.bench.masks import patterns_of
from attnsieve.bench.rows import Dense, Row
from attnsieve.bench.shapes import Shape
from attnsieve.bench.timing import Times
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.plan import Plan

# Kernels are compared with the oracle on a layer's call this long at most.
_CHECKED_LENGTH = 8192
# A run this long is measured once more, a shorter one three times.
_LONG_SECONDS = 2.0
DENSE_IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Setting:
    """What to measure: a model's size (see `hf.random_model`), prompts of `lengths` tokens in `batch` rows, masks for every
    head of every layer, and who computes: backends of `hf.apply` for masks, transformers' implementations for dense."""

    model: str
    lengths: Sequence[int]
    masks: Sequence[str]
    backends: Sequence[str] = ("auto",)
    dense: Sequence[str] = ("sdpa",)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    layers: int | None = None


def rows(setting: Setting) -> Iterator[Row]:
    """For every length, dense first: the first call (masks built in it) and later ones. What runs out of memory is a row
    without times that says so. Raises `WrongResult` where a backend fails the oracle on a layer's call, UserError for masks that
    are no patterns."""
    from attnsieve.hf import fingerprint
    from attnsieve.hf.random_model import random_model

    model = random_model(setting.model, setting.device, setting.dtype, setting.layers)
    mark = fingerprint(model)
    plans = {mask: Plan(mark, (patterns_of(mask, mark.heads),) * mark.layers) for mask in setting.masks}
    for n in setting.lengths:
        yield from _of_length(setting, model, _case(setting, mark, n), plans)


def _of_length(setting: Setting, model: Any, case: Case, plans: dict[str, Plan]) -> Iterator[Row]:
    from attnsieve.hf import apply

    dense: list[Row] = []
    for implementation in setting.dense:
        require(implementation in DENSE_IMPLEMENTATIONS, f"dense runs as {' or '.join(DENSE_IMPLEMENTATIONS)}")
        model.set_attn_implementation(implementation)
        for row in _measured(case, model, implementation, nullcontext, None, None):
            dense += [] if row.includes_mask_building else [row]
            yield row
    model.set_attn_implementation("sdpa")
    fastest = kernels.fastest(dense)
    for mask, plan in plans.items():
        for backend in setting.backends:
            verdict = _verdict(replace(case, mask=mask), backend)
            under = lambda plan=plan, backend=backend: apply(model, plan, backend=backend)  # noqa: E731
            yield from _measured(replace(case, mask=mask), model, backend, under, fastest, verdict)


def _case(setting: Setting, mark: Fingerprint, n: int) -> Case:
    shape = Shape(setting.model, mark.heads, mark.kv_heads, mark.head_dim)
    return Case.of(DENSE, n, shape, setting.dtype, setting.device, setting.batch)


def _verdict(case: Case, backend: str) -> Verdict:
    call = replace(case, n=min(case.n, _CHECKED_LENGTH), batch=1).call()
    return check_rows(call, *kernels.run_backend(call, "auto" if backend == "fastest" else backend))


def _measured(
    case: Case,
    model: Any,
    name: str,
    under: Callable[[], AbstractContextManager[Any]],
    dense: Dense | None,
    verdict: Verdict | None,
) -> Iterator[Row]:
    """The first call and later ones, in milliseconds, or one row that ran out of memory."""
    ids = torch.randint(model.config.vocab_size, (case.batch, case.n), generator=torch.Generator().manual_seed(0))
    ids = ids.to(case.device)
    density = 1.0 if case.mask == DENSE else kernels.density(replace(case, device="cpu").layout(), case.n, case.n)
    row = partial(Row.of, "ttft", name, case, density=density, baseline=dense, verdict=verdict)
    try:
        with under(), torch.inference_mode():
            first = _first_token(model, ids, case.device)
            yield row(Times.of([first]), _peak(case.device), building=True)
            repeats = 1 if first > _LONG_SECONDS * 1e3 else 3
            times = Times.of([_first_token(model, ids, case.device) for _ in range(repeats)])
            yield row(times, _peak(case.device), building=False)
    except torch.OutOfMemoryError:
        yield row(None, None, building=False)


def _first_token(model: Any, ids: torch.Tensor, device: str) -> float:
    """Milliseconds from a prompt to its next token, the cache filled for those after it."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    logits = model(ids, use_cache=True, logits_to_keep=1).logits
    logits.argmax(-1).tolist()
    return (time.perf_counter() - start) * 1e3


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else None
