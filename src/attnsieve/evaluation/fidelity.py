"""Fidelity per layer and head: what a plan keeps of dense attention, on the activations of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnsieve.attention import attend
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf.dense import own_attention, why_layer_dense
from attnsieve.hf.geometry import AttentionLayer, fingerprint
from attnsieve.hf.interface import LayerCall, LayerState, attach
from attnsieve.layout import Layout, compile_layout
from attnsieve.patterns import dense
from attnsieve.plan import Plan
from attnsieve.selection import choose


@dataclass(frozen=True, eq=False)
class LayerFidelity:
    """float64 [layers, query heads] each, of one text; layers are those with attention.

    density: kept pairs over causal pairs. retained: mean over rows of the softmax mass on kept keys. error: norm of (sparse -
    dense output) over norm of the dense output, of the head before the output projection. Layers that must keep the model's own
    attention (a sliding window, softcap, sinks) count as 1, 1 and 0.
    """

    density: Tensor
    retained: Tensor
    error: Tensor


@torch.inference_mode()
def layer_fidelity(
    model: Any, plan: Plan, ids: Sequence[int], *, last: int | None = None, backend: str = "auto"
) -> LayerFidelity:
    """Compare `plan` with dense attention in every layer during one dense forward pass over token `ids`.

    Every layer sees the q, k and v of the dense model, so errors do not add up. last: retained mass and error are those of the
    last rows alone, such as a question's; the density stays that of the text. O(n) memory beyond the pass itself: the
    retained mass of a row is exp(LSE of the kept keys - LSE of all keys). Raises UserError for a plan made for another model
    and for a model that has a handle.
    """
    require(len(ids) > 0, "layer_fidelity needs at least one token")
    last = len(ids) if last is None else last
    require(0 < last <= len(ids), f"last must be from 1 to the text's {len(ids)} tokens, got {last}")
    mark = fingerprint(model)
    plan.check(mark)
    shape = (mark.layers, mark.heads)
    result = LayerFidelity(*(torch.full(shape, value, dtype=torch.float64) for value in (1.0, 1.0, 0.0)))
    probe = _Probe(plan, mark, result, last, backend)
    detach = attach(model, probe.layer)
    try:
        model.base_model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        detach()
    return result


class _Probe:
    """Answers a layer's call as the model would and notes how its plan would have answered."""

    def __init__(self, plan: Plan, mark: Fingerprint, result: LayerFidelity, last: int, backend: str) -> None:
        self._plan, self._mark, self._result, self._last, self._backend = plan, mark, result, last, backend
        self._dense: Layout | None = None

    def layer(self, layer: AttentionLayer) -> LayerState:
        """The state of one layer."""

        def state(call: LayerCall) -> Tensor:
            if why_layer_dense(layer) is None:
                self._note(layer.index, call)
            return own_attention(call)

        return state

    def _note(self, index: int, call: LayerCall) -> None:
        q, k = call.query, call.key
        tokens = q.shape[2]
        if self._dense is None or self._dense.device != q.device:
            self._dense = compile_layout([dense()] * q.shape[1], tokens, q.device)
        layout = choose(self._plan.row(index), q, k, scale=call.scaling)
        full, full_lse = (part[:, :, -self._last :] for part in self._attend(call, self._dense))
        kept, kept_lse = (part[:, :, -self._last :] for part in self._attend(call, layout))
        place = self._mark.row(index)
        # A layout of KV heads stands for the query heads of each.
        self._result.density[place] = layout.density(tokens)[0].repeat_interleave(q.shape[1] // layout.heads)
        self._result.retained[place] = (kept_lse.double() - full_lse.double()).exp().mean(-1)[0]
        gap = (kept.double() - full.double()).norm(dim=(-2, -1)) / full.double().norm(dim=(-2, -1))
        self._result.error[place] = gap[0]
        finite = bool(self._result.error[place].isfinite().all())
        require(finite, f"layer {index} has NaN or infinite attention outputs: check the model's weights and dtype")

    def _attend(self, call: LayerCall, layout: Layout) -> tuple[Tensor, Tensor]:
        out = attend(call.query, call.key, call.value, layout, scale=call.scaling, backend=self._backend, return_lse=True)
        assert isinstance(out, tuple)
        return out
