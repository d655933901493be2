"""Time to first token and peak memory of whole models: dense beside plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from attnsieve.bench import kernels
from attnsieve.bench.case import DENSE, Case
from attnsieve.bench.check import Verdict, check_rows
from attnsieve.bench.masks import patterns_of
from attnsieve.bench.rows import Row
from attnsieve.bench.shapes import Shape
from attnsieve.bench.timing import Times
from attnsieve.errors import UserError, require
from attnsieve.fingerprint import Fingerprint
from attnsieve.plan import Plan

if TYPE_CHECKING:
    from attnsieve.hf.report import Report

# Kernels are compared with the oracle on a layer's call this long at most.
_CHECKED_LENGTH = 8192
# A run this long is measured once more, a shorter one three times.
_LONG_SECONDS = 2.0
DENSE_IMPLEMENTATIONS = ("sdpa", "eager")
TEXT = "python-docs"


@dataclass(frozen=True)
class Setting:
    """What to measure: a model, prompts of `lengths` tokens in `batch` rows, masks, and who computes: backends of `hf.apply` for
    masks, transformers' implementations for dense.

    model: a size of `hf.random_model`, with random weights and prompts, or what `hf.load_model` takes, with prompts of TEXT.
    masks: patterns for every head of every layer, or folders of plans saved for the model.
    """

    model: str
    lengths: Sequence[int]
    masks: Sequence[str]
    backends: Sequence[str] = ("auto",)
    dense: Sequence[str] = ("sdpa",)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    layers: int | None = None


@dataclass(frozen=True)
class _Subject:
    """A model, and its prompts [batch, n] by length."""

    model: Any
    prompts: Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class _Masked:
    """A plan, what rows call it, and the mask of a layer with attention in its middle, as `masks.mask` knows it."""

    plan: Plan
    label: str
    layer: str


def rows(setting: Setting) -> Iterator[Row]:
    """For every length, dense first: the first call (masks built in it) and later ones. What runs out of memory is a row
    without times that says so. Raises `WrongResult` where a backend fails the oracle on a layer's call, UserError for masks that
    are neither patterns nor plans of the model."""
    from attnsieve.hf import fingerprint

    subject = _subject(setting)
    mark = fingerprint(subject.model)
    masked = [_masked(mask, mark) for mask in setting.masks]
    for n in setting.lengths:
        yield from _of_length(setting, subject, _case(setting, mark, n), masked)


def _subject(setting: Setting) -> _Subject:
    from attnsieve.hf.random_model import CONFIGS

    return _random(setting) if setting.model in CONFIGS else _real(setting)


def _random(setting: Setting) -> _Subject:
    from attnsieve.hf.random_model import random_model

    model = random_model(setting.model, setting.device, setting.dtype, setting.layers)

    def prompts(n: int) -> torch.Tensor:
        return torch.randint(model.config.vocab_size, (setting.batch, n), generator=torch.Generator().manual_seed(0))

    return _Subject(model, prompts)


def _real(setting: Setting) -> _Subject:
    from attnsieve.evaluation.text import text_source, token_windows
    from attnsieve.hf import check_positions, load_model
    from attnsieve.hf.texts import ids_of

    require(setting.layers is None, f"{setting.model} is a real model: it is measured with all its layers")
    model, tokenizer = load_model(setting.model, dtype=setting.dtype, device=setting.device)
    check_positions(model, max(setting.lengths))
    source = text_source(TEXT)
    return _Subject(model, lambda n: ids_of(model, token_windows(source, tokenizer, n, setting.batch)))


def _masked(mask: str, mark: Fingerprint) -> _Masked:
    if not Path(mask).is_dir():
        return _Masked(Plan(mark, (patterns_of(mask, mark.heads),) * mark.layers), mask, mask)
    plan = Plan.from_pretrained(mask)
    plan.check(mark)
    return _Masked(plan, Path(mask).name, f"{mask}:{mark.indices[mark.layers // 2]}")


def _of_length(setting: Setting, subject: _Subject, case: Case, masked: Sequence[_Masked]) -> Iterator[Row]:
    from attnsieve.hf import apply

    model, ids = subject.model, subject.prompts(case.n).to(case.device)
    dense: list[Row] = []
    for implementation in setting.dense:
        require(
            implementation in DENSE_IMPLEMENTATIONS,
            f"dense runs as {' or '.join(DENSE_IMPLEMENTATIONS)}, got {implementation!r}",
        )
        _switch(model, implementation)
        made = partial(Row.of, "ttft", implementation, case, density=1.0)
        for row in _measured(model, ids, nullcontext, made):
            dense += [] if row.includes_mask_building else [row]
            yield row
    fastest = kernels.fastest(dense)
    for each in masked:
        kept = _densities(model, each.plan, ids[0])
        for backend in setting.backends:
            made = partial(Row.of, "ttft", backend, replace(case, mask=each.label), density=_mean(kept), baseline=fastest)
            verdict = _verdict(replace(case, mask=each.layer), backend)
            if verdict is None:
                yield made(None, None, building=False)
                continue
            under = partial(apply, model, each.plan, backend=backend)
            yield from _measured(model, ids, under, partial(made, verdict=verdict), kept)


def _switch(model: Any, implementation: str) -> None:
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        others = " or ".join(name for name in DENSE_IMPLEMENTATIONS if name != implementation)
        raise UserError(
            f"{type(model).__name__} does not run as {implementation}: take {others} as its baseline (--baselines)"
        ) from None


def _case(setting: Setting, mark: Fingerprint, n: int) -> Case:
    # Rows do not name folders of the machine.
    name = Path(setting.model).name.removesuffix(".gguf")
    shape = Shape(name, mark.heads, mark.kv_heads, mark.head_dim)
    return Case.of(DENSE, n, shape, setting.dtype, setting.device, setting.batch)


def _verdict(case: Case, backend: str) -> Verdict | None:
    """None where memory runs out."""
    try:
        call = replace(case, n=min(case.n, _CHECKED_LENGTH), batch=1).call()
        return check_rows(call, *kernels.run_backend(call, "auto" if backend == "fastest" else backend))
    except torch.OutOfMemoryError:
        return None


def _densities(model: Any, plan: Plan, ids: torch.Tensor) -> dict[int, float] | None:
    """By layer, of all its heads; where keys are chosen from the input, on this prompt, and None where memory runs out."""
    from attnsieve.evaluation.density import layer_densities
    from attnsieve.evaluation.fidelity import layer_fidelity
    from attnsieve.hf import fingerprint

    if not plan.dynamic:
        return layer_densities(model, plan, len(ids))
    try:
        found = layer_fidelity(model, plan, ids.tolist()).density.mean(1)
    except torch.OutOfMemoryError:
        return None
    return dict(zip(fingerprint(model).indices, found.tolist(), strict=True))


def _mean(densities: dict[int, float] | None) -> float | None:
    return None if densities is None else fmean(densities.values())


def _measured(
    model: Any,
    ids: torch.Tensor,
    under: Callable[[], AbstractContextManager[Any]],
    row: Callable[..., Row],
    densities: dict[int, float] | None = None,
) -> Iterator[Row]:
    """The first call and later ones, in milliseconds, or one row that ran out of memory. densities: of a plan's layers, where they
    run sparse."""
    device = str(ids.device)
    try:
        with under() as handle, torch.inference_mode():
            first = _first_token(model, ids, device)
            if densities is not None:
                row = partial(row, density=_mean(_as_run(densities, handle.report())))
            yield row(Times.of([first]), _peak(device), building=True)
            repeats = 1 if first > _LONG_SECONDS * 1e3 else 3
            times = Times.of([_first_token(model, ids, device) for _ in range(repeats)])
            yield row(times, _peak(device), building=False)
    except torch.OutOfMemoryError:
        yield row(None, None, building=False)


def _as_run(densities: dict[int, float], report: Report) -> dict[int, float]:
    """1 for layers that stayed dense although the plan is sparse there, such as by the backend "fastest"."""
    from attnsieve.hf.report import BY_PLAN

    return densities | {layer.layer: 1.0 for layer in report.layers if layer.dense.keys() - {BY_PLAN}}


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
