"""A layer's own attention, and the reasons for which a layer has to stay with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnsieve.errors import require
from attnsieve.hf.geometry import AttentionLayer
from attnsieve.hf.interface import LayerCall
from attnsieve.hf.masks import spans_of_mask
from attnsieve.patterns import Pattern


def own_attention(call: LayerCall) -> Tensor:
    """What the model computes without masks of ours: [B, Tq, Hq, Dv]. sdpa, or the model's eager code where sdpa cannot."""
    if not _changes_softmax(call):
        forward, mask = sdpa_attention_forward, _last_rows(call) if call.mask is None else call.mask
    else:
        forward, mask = _eager_of(call), _additive_mask(call)
    out, _ = forward(
        call.module, call.query, call.key, call.value, mask, scaling=call.scaling, dropout=call.dropout, **call.options
    )
    return out


def _changes_softmax(call: LayerCall) -> bool:
    """Whether the model caps its scores or has sinks, which sdpa cannot compute."""
    return any(call.options.get(name) is not None for name in ("softcap", "s_aux", "sinks"))


def _eager_of(call: LayerCall):  # type: ignore[no-untyped-def]
    name = type(call.module).__name__
    eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
    require(eager is not None, f"{name} caps its scores or has sinks, and its model has no eager attention to leave it to")
    return eager


def _additive_mask(call: LayerCall) -> Tensor:
    """Eager code adds its mask and knows no causality: 0 where a key may be read, the lowest number elsewhere."""
    mask = call.mask
    if mask is None:
        # None means causal from the first slot on (an empty cache, perhaps with room), or one token that reads everything.
        mask = _every_slot(call) if call.tokens == 1 else _every_slot(call).tril(call.tokens - call.query.shape[2])
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(call.query.dtype).min
    return torch.zeros_like(mask, dtype=call.query.dtype).masked_fill_(~mask, lowest)


def _last_rows(call: LayerCall) -> Tensor | None:
    """The rows of the last queries where a layer runs for them alone, which sdpa would take for the first ones; else None."""
    before = call.tokens - call.query.shape[2]
    return _every_slot(call).tril(before) if before else None


def _every_slot(call: LayerCall) -> Tensor:
    return torch.ones(1, 1, call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=call.query.device)


# Layer types whose attention is to all earlier keys or those of a window; "hybrid" has recurrent states beside it.
PLAIN = ("full_attention", "sliding_attention", "hybrid")
# What to do where such a layer keeps a model from being observed.
LEFT_DENSE = "write a plan by hand, which leaves this layer dense, or take another model"


def why_layer_dense(layer: AttentionLayer, row: Iterable[Pattern]) -> str | None:
    """Why no call of this layer can run with these patterns, or None."""
    return why_not_plain(layer) or _why_not_within(layer, row)


def why_not_plain(layer: AttentionLayer) -> str | None:
    """Why this layer is not a softmax over the causal keys, or those of a sliding window; None if it is."""
    if layer.softcap:
        return "softcap: the model caps its attention scores"
    if layer.sinks:
        return "sinks: learned sinks take part in the model's softmax"
    if layer.kind not in PLAIN:
        return f"layer type {layer.kind}: the model restricts this layer by its own rule"
    return None


def _why_not_within(layer: AttentionLayer, row: Iterable[Pattern]) -> str | None:
    """Why patterns cannot be cut to the layer's sliding window, or None. A window that can bind decides from the first token on:
    a layer that changed its rule when the text grows past it would give earlier tokens another meaning in longer texts."""
    window = layer.binding_window
    if window is None:
        return None
    restricted = f"sliding window: the model itself restricts this layer to the {window} newest tokens"
    if layer.shared or window == 1:
        return restricted
    strange = [str(atom) for pattern in row for atom in pattern if atom.dynamic or atom.blocks(1) is not None]
    return f"{restricted}, which {strange[0]} cannot be cut to" if strange else None


def why_call_dense(layer: AttentionLayer, call: LayerCall) -> str | None:
    """Why this call cannot run sparse, or None. Never reads the device. Raises UserError beyond context and window."""
    reason = why_call_not_plain(call)
    if reason is not None:
        return reason
    window = call.options.get("sliding_window") or layer.window
    if window != layer.window:
        return f"sliding window: this call has another ({window}) than the layer ({layer.window})"
    # From the window on, caches drop keys, and key slots are no longer positions.
    most = call.k_slots if call.query.shape[2] == call.k_slots else call.k_slots + 1
    require(
        window is None or layer.binding_window is not None or most <= window,
        f"the text or its cache has {call.k_slots} tokens, beyond the model's context of {layer.context} and its sliding "
        f"window of {window}: use a shorter one",
    )
    return None


def why_call_not_plain(call: LayerCall) -> str | None:
    """Why this call is not a softmax of scaled products over earlier keys, or None. Never reads the device."""
    causal = call.options.get("is_causal")
    if _changes_softmax(call):
        return "softcap or sinks: the model changes its softmax"
    if call.options.get("position_bias") is not None:
        return "position bias: the model adds a learned bias to its scores"
    if not (getattr(call.module, "is_causal", True) if causal is None else causal):
        return "bidirectional: masks are defined for causal attention"
    if call.dropout > 0:
        return "dropout: attention dropout is on; set attention_dropout to 0 or use model.eval()"
    return None


def refuse_to_observe(layer: AttentionLayer, call: LayerCall) -> None:
    """Raise UserError for calls whose attention is not a softmax over all earlier keys, or over those of a window: what is
    observed of queries and keys would not be what the model attends to."""
    reason = why_call_not_plain(call)
    if reason is None and layer.window is None and call.options.get("sliding_window") is None and call.mask is not None:
        explained = spans_of_mask(call.mask) if call.mask.dtype == torch.bool else "the model makes a mask of its own"
        reason = explained if isinstance(explained, str) else None
    require(reason is None, f"layer {layer.index} cannot be observed ({reason}): {LEFT_DENSE}")


def refuse_unservable(call: LayerCall, heads: int) -> None:
    """Raise UserError for calls that neither a sparse nor a dense layer can answer right."""
    options = call.options
    require(
        not options.get("output_attentions"),
        "output_attentions asks for all attention weights, which sparse attention never computes; remove the handle and load "
        'the model with attn_implementation="eager" to look at them',
    )
    require(
        all(options.get(name) is None for name in ("cache", "block_table")),
        "continuous batching hands over a paged cache, which attnsieve does not serve; use model.generate",
    )
    require(
        all(options.get(name) is None for name in ("indices", "block_indices")),
        f"{type(call.module).__name__} chooses keys by an indexer of its own and tells only transformers' own attention functions "
        "through their masks: such models are not supported",
    )
    require(
        call.query.shape[1] == heads,
        f"the layer was called with {call.query.shape[1]} query heads, the plan has {heads}: heads split over devices "
        "(tensor parallelism) and layers with numbers of heads of their own are not served",
    )
