"""Fidelity per layer and head: what a plan keeps of dense attention, on the activations of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf.dense import own_attention, why_layer_dense
from attnsieve.hf.effect import attended, effect
from attnsieve.hf.geometry import AttentionLayer, check_positions, fingerprint
from attnsieve.hf.interface import LayerCall, LayerState, observing
from attnsieve.hf.locate import SpanMemo, locate
from attnsieve.hf.texts import ids_of
from attnsieve.layout import Layout, compile_layout
from attnsieve.patterns import dense
from attnsieve.plan import Plan
from attnsieve.selection import choose


@dataclass(frozen=True, eq=False)
class LayerFidelity:
    """float64 [layers, query heads] each, of one text; layers are those with attention.

    density: kept pairs over causal pairs. retained: mean over rows of the softmax mass on kept keys. error: norm of (sparse -
    dense output) over norm of the dense output, of the head before the output projection. Of layers with sliding windows, dense is
    the window. Layers that must keep the model's own attention (softcap, sinks) count as 1, 1 and 0.
    """

    density: Tensor
    retained: Tensor
    error: Tensor


def layer_fidelity(
    model: Any, plan: Plan, ids: Sequence[int], *, last: int | None = None, backend: str = "auto"
) -> LayerFidelity:
    """Compare `plan` with dense attention in every layer during one dense forward pass over token `ids`.

    Every layer sees the q, k and v of the dense model, so errors do not add up. last: retained mass and error are those of the
    last rows alone, such as a question's; the density stays that of the text. O(n) memory beyond the pass itself: the
    retained mass of a row is exp(LSE of the kept keys - LSE of all keys). Raises UserError for a plan made for another model,
    a text beyond the model's positions, and a model that has a handle.
    """
    require(len(ids) > 0, "layer_fidelity needs at least one token")
    last = len(ids) if last is None else last
    check_positions(model, len(ids))
    require(0 < last <= len(ids), f"last must be from 1 to the text's {len(ids)} tokens, got {last}")
    mark = fingerprint(model)
    plan.check(mark)
    shape = (mark.layers, mark.heads)
    result = LayerFidelity(*(torch.full(shape, value, dtype=torch.float64) for value in (1.0, 1.0, 0.0)))
    probe = _Probe(plan, mark, result, last, backend)
    with observing(model, probe.layer):
        model.base_model(ids_of(model, [list(ids)]), use_cache=False)
    return result


class _Probe:
    """Answers a layer's call as the model would and notes how its plan would have answered."""

    def __init__(self, plan: Plan, mark: Fingerprint, result: LayerFidelity, last: int, backend: str) -> None:
        self._plan, self._mark, self._result, self._last, self._backend = plan, mark, result, last, backend
        # Sums over the calls of a layer: DiffLlama's attend twice to a text, with other values.
        self._change, self._size = torch.zeros_like(result.error), torch.zeros_like(result.error)
        self._dense: dict[tuple[torch.device, int | None], Layout] = {}
        self._memo = SpanMemo()

    def layer(self, layer: AttentionLayer) -> LayerState:
        """The state of one layer."""

        def state(call: LayerCall) -> Tensor:
            never = why_layer_dense(layer, self._plan.row(layer.index))
            if never is None and not isinstance(locate(layer, call, self._memo), str):
                self._note(layer, call)
            return own_attention(call)

        return state

    def _note(self, layer: AttentionLayer, call: LayerCall) -> None:
        q, k, index, window = call.query, call.key, layer.index, layer.binding_window
        tokens = q.shape[2]
        row = self._plan.row(index)
        layout = (
            choose(row, q, k, scale=call.scaling) if window is None else compile_layout(row, tokens, q.device, window=window)
        )
        whole = attended(call, self._whole(q, window), self._backend)
        seen = effect(call, layout, whole, self._backend, self._last)
        place = self._mark.row(index)
        self._result.density[place], self._result.retained[place] = seen.density, seen.retained
        self._change[place] += seen.change.cpu()
        self._size[place] += seen.size.cpu()
        self._result.error[place] = (self._change[place] / self._size[place]).sqrt()
        finite = bool(self._result.error[place].isfinite().all())
        require(finite, f"layer {index} has NaN or infinite attention outputs: check the model's weights and dtype")

    def _whole(self, q: Tensor, window: int | None) -> Layout:
        """What a layer attends to without a plan."""
        key = (q.device, window)
        if key not in self._dense:
            self._dense[key] = compile_layout([dense()] * q.shape[1], q.shape[2], q.device, window=window)
        return self._dense[key]
