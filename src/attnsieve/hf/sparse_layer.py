"""What one layer does under a plan: its calls run sparse, or as the model would with the reason counted."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from attnsieve.attention import choose_backend, compute, dense_is_faster
from attnsieve.backends.call import Call
from attnsieve.errors import UserError, require
from attnsieve.hf.cache_layer import RaggedLayer, Seat
from attnsieve.hf.dense import own_attention, refuse_unservable, why_layer_dense
from attnsieve.hf.geometry import AttentionLayer
from attnsieve.hf.interface import LayerCall
from attnsieve.hf.locate import Place, SpanMemo, locate
from attnsieve.hf.report import BY_PLAN, FASTER, LayerReport
from attnsieve.layout import Layout, capacity_for, compile_layout, settled_layout, settled_row
from attnsieve.patterns import Pattern, dense
from attnsieve.selection import choose
from attnsieve.selection.cost import takes_as_long_as_dense
from attnsieve.spans import Spans

# `auto`, and the model's own dense attention for calls that it serves faster.
FASTEST = "fastest"

logger = logging.getLogger("attnsieve")


def sparse_heads(row: tuple[Pattern, ...]) -> int:
    """How many of a layer's heads are not dense."""
    return sum(pattern != dense() for pattern in row)


class LayoutCache:
    """Layouts of a model's layers: one per row of patterns and power-of-two capacity, built when first needed."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[tuple[Pattern, ...], int, torch.device, int | None], Layout] = {}

    def get(self, patterns: tuple[Pattern, ...], capacity: int, device: torch.device, window: int | None) -> Layout:
        """The layout for `capacity` positions within a sliding window. Layers with the same patterns share it."""
        key = (patterns, capacity, device, window)
        if key not in self._layouts:
            self._layouts[key] = compile_layout(patterns, capacity, device, window=window)
        return self._layouts[key]


class SparseLayer:
    """One layer under a plan: runs its calls sparse, or as the model would with the reason counted."""

    def __init__(
        self,
        layer: AttentionLayer,
        row: tuple[Pattern, ...],
        layouts: LayoutCache,
        memo: SpanMemo,
        backend: str,
        strict: bool,
    ) -> None:
        self.calls = LayerReport(layer.index, sparse_heads(row))
        self._dynamic = any(pattern.dynamic for pattern in row)
        self._layer, self._row, self._never = layer, row, why_layer_dense(layer, row)
        self._window = layer.binding_window
        self._layouts, self._memo, self._strict = layouts, memo, strict
        self._fastest, self._backend = backend == FASTEST, "auto" if backend == FASTEST else backend
        self._own: dict[tuple[int, int, torch.device], Layout] = {}
        self.seat = Seat(layer.index, row, self._never or self._why_whole())

    def __call__(self, call: LayerCall) -> Tensor:
        remembered = self.seat.take(call.key)
        refuse_unservable(call, len(self._row))
        if remembered is not None:
            return self._remembered(call, remembered)
        if not self.calls.sparse_heads:
            self.calls.dense[BY_PLAN] += 1
            return own_attention(call)
        place = self._never or locate(self._layer, call, self._memo)
        if isinstance(place, str):
            self._stay_dense(place)
            return own_attention(call)
        return self._follow_plan(call, place)

    def _why_whole(self) -> str | None:
        """Why the layer's cache drops nothing by the plan, or None."""
        if self._window is not None:
            return f"sliding window: transformers' cache keeps the {self._window} newest keys alone"
        return None if self.calls.sparse_heads else BY_PLAN

    def _stay_dense(self, reason: str) -> None:
        index = self._layer.index
        require(not self._strict, f"strict: the plan makes layer {index} sparse, but this call must stay dense ({reason})")
        if reason not in self.calls.dense:
            logger.warning("layer %d stays dense although the plan is sparse there (%s)", index, reason)
        self.calls.dense[reason] += 1

    def _remembered(self, call: LayerCall, layer: RaggedLayer) -> Tensor:
        """A call whose past keys are in a `SparseCache`."""
        call = replace(call, past=layer.seen - call.key.shape[2])
        place = locate(self._layer, call, self._memo)
        if isinstance(place, str):
            raise UserError(f"layer {self._layer.index} must stay dense here ({place}), which a SparseCache does not serve")
        require(
            place.k_slots == call.k_slots, "a SparseCache needs the mask that transformers makes for later chunks of a text"
        )
        batch, found = len(call.query), place
        start = [0] * batch if call.mask is None else self._memo.starts(found.spans, batch, found.k_slots)
        query, key, value = _autocast(call.query, call.key, call.value)
        if layer.steps(query, start, self._backend):
            self.calls.sparse[found.phase] += 1
            self.calls.backends["ragged"] += 1
            return layer.step(query, key, value, call.scale, self._backend)
        return layer.attend(key, value, start, lambda k, v: self._follow_plan(replace(call, key=k, value=v, past=0), found))

    def _follow_plan(self, call: LayerCall, place: Place) -> Tensor:
        key, value = call.key, call.value
        if place.k_slots < key.shape[2]:
            key, value = key[:, :, : place.k_slots], value[:, :, : place.k_slots]
        query, key, value = _autocast(call.query, key, value)
        spans = place.spans
        if (
            self._fastest
            and self._dynamic
            and self._may_run_dense(call)
            and self._choosing_is_slow(query, key, value, spans, call)
        ):
            return self._faster_dense(call)
        if self._dynamic:
            layout = choose(self._row, query, key, spans=spans, scale=call.scale)
        else:
            layout = self._layout(key.shape[1], place.k_slots, query.device)
        if place.within is not None and self._window is not None:
            if place.within.earliest >= settled_row(layout, self._window):
                layout, spans = settled_layout(layout, capacity_for(key.shape[2])), place.within.stored
            else:
                key, value = _with_dropped(key, place.k_slots), _with_dropped(value, place.k_slots)
        backend = self._backend
        # Of masks chosen from the input the choice has been paid for.
        if self._fastest and not self._dynamic and self._may_run_dense(call):
            request = Call(query, key, value, layout, spans, call.scale)
            backend = choose_backend(request)
            if dense_is_faster(request, backend):
                return self._faster_dense(call)
        backend, out, _ = compute(query, key, value, layout, spans=spans, scale=call.scale, backend=backend)
        self.calls.sparse[place.phase] += 1
        self.calls.backends[backend] += 1
        return out.transpose(1, 2).contiguous()

    def _layout(self, kv_heads: int, tokens: int, device: torch.device) -> Layout:
        """The layout of the layer's fixed patterns for at least `tokens` positions."""
        capacity = capacity_for(tokens)
        key = (kv_heads, capacity, device)
        if key not in self._own:
            # Patterns take long to hash: that they are shared is found out once.
            self._own[key] = self._layouts.get(_per_kv_head(self._row, kv_heads), capacity, device, self._window)
        return self._own[key]

    def _may_run_dense(self, call: LayerCall) -> bool:
        """Whether costs decide: dense decode steps would need keys that the plan lets caches drop, and masks slow dense kernels
        down by an unknown factor."""
        return call.mask is None and call.query.shape[2] > 1

    def _choosing_is_slow(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, call: LayerCall) -> bool:
        everything = self._layouts.get((dense(),) * key.shape[1], capacity_for(key.shape[2]), query.device, None)
        return takes_as_long_as_dense(self._row, Call(query, key, value, everything, spans, call.scale))

    def _faster_dense(self, call: LayerCall) -> Tensor:
        self.calls.dense[FASTER] += 1
        return own_attention(call)


def _per_kv_head(row: tuple[Pattern, ...], kv_heads: int) -> tuple[Pattern, ...]:
    """One pattern per KV head where the query heads of every group share theirs, which spares kernels work; else `row`."""
    group = len(row) // kv_heads
    shared = all(len(set(row[start : start + group])) == 1 for start in range(0, len(row), group))
    return row[::group] if shared else row


def _with_dropped(states: Tensor, slots: int) -> Tensor:
    """Zeros for the keys or values that a sliding window's cache has dropped, so that slots are positions; no query reads them."""
    return torch.nn.functional.pad(states, (0, 0, slots - states.shape[2], 0))


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where autocast is on, as torch does for its own attention; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
