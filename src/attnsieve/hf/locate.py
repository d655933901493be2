"""Where the sequences of one attention call are, and which part of generation it belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.hf.dense import why_call_dense
from attnsieve.hf.geometry import AttentionLayer
from attnsieve.hf.interface import LayerCall
from attnsieve.hf.masks import DROPPED, Within, first_own_slot, spans_of_mask, spans_within
from attnsieve.spans import Spans

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Place:
    """The spans of a call, the key slots they speak of (fewer than there are keys where a static cache has an unwritten rest, more
    where a sliding window's cache has dropped the first) and its phase. within: where that cache has dropped keys, what it stores."""

    spans: Spans
    k_slots: int
    phase: str
    within: Within | None = None


class SpanMemo:
    """What masks were found to mean, kept while the layers of one forward pass share them."""

    def __init__(self) -> None:
        self._layer = -1
        self._starts: tuple[weakref.ref[Spans], list[int]] | None = None
        self._known: dict[Hashable, tuple[weakref.ref[Tensor] | None, Any]] = {}

    def get(self, layer: int, mask: Tensor | None, key: Hashable, read: Callable[[], T]) -> T:
        """The answer for `mask` and `key` in this forward pass, from `read` the first time."""
        # Layers run in ascending order: one that does not come later opens a new pass, where a mask may have new content.
        if layer <= self._layer:
            self._known.clear()
        self._layer = layer
        known = self._known.get((id(mask), key))
        if known is None or (known[0] is not None and known[0]() is not mask):
            known = (None if mask is None else weakref.ref(mask), read())
            self._known[id(mask), key] = known
        return cast(T, known[1])

    def starts(self, spans: Spans, batch: int, k_slots: int) -> list[int]:
        """Per batch row the slot of its sequence's first token, `k_slots` where all is padding. Reads the device, once for all
        layers of a pass.

        Raises UserError unless every row is one sequence that ends in the last slot.
        """
        if self._starts is None or self._starts[0]() is not spans:
            self._starts = (weakref.ref(spans), _starts(spans, batch, k_slots))
        return self._starts[1]


def locate(layer: AttentionLayer, call: LayerCall, memo: SpanMemo) -> Place | str:
    """The place of a call of a layer that can follow a plan, or the reason why this call cannot: what it asks of the model's own
    attention, or a mask that cannot be expressed as sequences.

    Masks count positions from a sequence's first slot, so padding shifts nothing. Raises UserError as `why_call_dense` does,
    and for packed documents that the mask does not separate.
    """
    return why_call_dense(layer, call) or _of_mask(layer.index, call, memo, layer.binding_window)


def _of_mask(layer: int, call: LayerCall, memo: SpanMemo, window: int | None) -> Place | str:
    """window: the sliding window that the call's mask must be of, or None."""
    batch, _, q_slots, _ = call.query.shape
    k_slots, device = call.k_slots, call.query.device
    mask = call.mask
    if mask is None:
        if call.tokens > k_slots:
            return "there are more queries than keys"
        # More than one token and no mask: causal from slot 0 on, even where a static cache returns its unwritten rest.
        used = k_slots if call.tokens == 1 else call.tokens
        if window is not None and used > window:
            return f"the model gave no mask for its sliding window of {window}"
        spans: Spans | str = memo.get(layer, None, (batch, q_slots, used, device), lambda: _unmasked(call, used))
    else:
        used, expected = k_slots, (batch, 1, q_slots, k_slots)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            return _why_not_ours(mask)
        given = mask
        if window is not None:
            return _place_within(memo.get(layer, mask, window, lambda: spans_within(given, window)), mask, q_slots)
        spans = memo.get(layer, mask, None, lambda: spans_of_mask(given))
    return spans if isinstance(spans, str) else Place(spans, used, _phase(q_slots, mask))


def _why_not_ours(mask: Tensor) -> str:
    """Without lengths, which differ in every step: reasons are counted, and warned of once."""
    if mask.dtype != torch.bool:
        return f"the caller's own mask is {mask.dtype}, not bool"
    per_head = mask.ndim == 4 and mask.shape[1] > 1
    return f"the caller's own mask {'differs between heads' if per_head else 'has not the size of this call'}"


def _place_within(found: Within | str, mask: Tensor, q_slots: int) -> Place | str:
    """The place of a call with a sliding window's mask."""
    if isinstance(found, str):
        return found
    dropped: int = getattr(mask, DROPPED)
    return Place(found.spans, dropped + mask.shape[3], _phase(q_slots, mask), found if dropped else None)


def _starts(spans: Spans, batch: int, k_slots: int) -> list[int]:
    rows = spans.rows()
    alone = len({row[0] for row in rows}) == len(rows)
    require(
        alone and all(k_start + k_len == k_slots for _, _, _, k_start, k_len in rows),
        "a SparseCache needs one sequence per batch row, padded on the left",
    )
    found = {b: k_start for b, _, _, k_start, _ in rows}
    return [found.get(b, k_slots) for b in range(batch)]


def _phase(q_slots: int, mask: Tensor | None) -> str:
    if q_slots == 1:
        return "decode"
    return "chunk" if mask is not None and first_own_slot(mask) > 0 else "prefill"


def _unmasked(call: LayerCall, k_slots: int) -> Spans:
    batch, _, q_slots, _ = call.query.shape
    _refuse_unseparated(call)
    return Spans.full(batch, q_slots, k_slots, call.query.device)


def _refuse_unseparated(call: LayerCall) -> None:
    """Packed documents without a block-diagonal mask would read each other, and masks would count from the wrong token."""
    lengths, positions = call.options.get("cu_seq_lens_q"), call.options.get("position_ids")
    packed = lengths is not None and lengths.numel() > 2
    if call.tokens > 1 and positions is not None and positions.ndim == 2:
        packed = packed or bool((positions.diff(dim=-1) < 0).any())
    require(
        not packed,
        "the positions restart (packed documents), but transformers made no mask that separates the documents; pass "
        "position_ids without attention_mask and with use_cache=False",
    )
