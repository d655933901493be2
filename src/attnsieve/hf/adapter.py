"""apply: run a transformers model under a plan, and undo it without a trace."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from transformers import PreTrainedConfig, PreTrainedModel

from attnsieve.attention import BACKENDS
from attnsieve.errors import UserError, require
from attnsieve.hf.cache import SparseCache
from attnsieve.hf.dense import why_layer_dense
from attnsieve.hf.geometry import AttentionLayer, attention_layers, fingerprint, text_config
from attnsieve.hf.interface import attach
from attnsieve.hf.locate import SpanMemo
from attnsieve.hf.report import Report
from attnsieve.hf.sparse_layer import FASTEST, LayoutCache, SparseLayer, sparse_heads
from attnsieve.plan import Plan


def apply(model: PreTrainedModel, plan: Plan, *, backend: str = "auto", strict: bool = False) -> Handle:
    """Run `model` with the attention of `plan` until the returned handle is removed or its `with` block ends.

    Layers with a sliding window of the model's own follow the part of the plan that lies inside it. Layers that cannot follow the plan
    (patterns that choose from the input or keep blocks in such a window, softcap, sinks, dropout, masks of the caller's own)
    keep the model's own attention; the handle's report names them, and with `strict` they raise UserError.

    `backend` as in `attnsieve.attend`, always exactly the plan's pairs; or "fastest": as "auto", but prompts and chunks that
    the plan would make slower than dense attention, by measured costs, run dense: of fixed patterns where their attention takes
    longer, of those that choose from the input where choosing alone takes as long. Their results then depend on the length and
    on the machine, so measure a plan's accuracy with "auto". The report counts these calls by name.

    Raises UserError for a plan made for another model, a model without the attention interface, a model that has a handle
    already, and an unknown backend. Until the handle is removed a pass raises it too, strict or not, once another attention
    implementation was set (`model.set_attn_implementation`): it would run dense. With gradient checkpointing call backward before
    the handle is removed: it computes layers again.
    """
    known = ("auto", *BACKENDS, FASTEST)
    require(backend in known, f"unknown backend {backend!r}; choose from {', '.join(known)}")
    require(
        not (strict and backend == FASTEST), 'strict forbids dense attention, which backend "fastest" may choose: use "auto"'
    )
    mark = fingerprint(model)
    require(
        isinstance(plan, Plan),
        f"apply takes a Plan, got {plan!r:.80}: Plan.uniform(fingerprint(model), pattern) makes one of a pattern",
    )
    plan.check(mark)
    if strict:
        _refuse_dense_layers(attention_layers(model), plan)
    layouts, memo = LayoutCache(), SpanMemo()
    layers: list[SparseLayer] = []

    def make(layer: AttentionLayer) -> SparseLayer:
        layers.append(SparseLayer(layer, plan.row(layer.index), layouts, memo, backend, strict))
        return layers[-1]

    detach = attach(model, make)
    return Handle(detach, layers, text_config(model))


def _refuse_dense_layers(layers: list[AttentionLayer], plan: Plan) -> None:
    for layer in layers:
        reason = why_layer_dense(layer, plan.row(layer.index))
        if reason is not None and sparse_heads(plan.row(layer.index)):
            raise UserError(f"strict: the plan makes layer {layer.index} sparse, but it must stay dense ({reason})")


class Handle:
    """An applied plan. A context manager; removing it restores the model bit for bit."""

    def __init__(self, detach: Callable[[], None], layers: list[SparseLayer], config: PreTrainedConfig) -> None:
        self._detach: Callable[[], None] | None = detach
        self._layers, self._config = layers, config

    def remove(self) -> None:
        """Restore the model's own attention. Does nothing the second time."""
        if self._detach is not None:
            self._detach()
            self._detach = None
            for layer in self._layers:
                layer.seat.active = False

    def cache(self, max_length: int) -> SparseCache:
        """An empty cache for `past_key_values` that stores only keys which later rows read under this plan, for up to
        `max_length` tokens, padding included. One for every batch; it is refused once the handle is removed.

        Raises UserError if no layer of the plan can drop keys, with the reasons.
        """
        require(self._detach is not None, "the handle was removed: apply the plan again to make a cache")
        return SparseCache(self._config, [layer.seat for layer in self._layers], max_length)

    def report(self) -> Report:
        """Calls so far: what ran sparse, what stayed dense, and why."""
        return Report(tuple(layer.calls for layer in self._layers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()
