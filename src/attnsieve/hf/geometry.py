"""What a transformers model's attention looks like: its fingerprint and its attention layers."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attnsieve.errors import UserError, require
from attnsieve.fingerprint import Fingerprint

# Configuration entries that change what attention maps look like. Not the context limit, dtype, paths or sizes of MLPs.
HASHED = (
    "rope_parameters",
    "partial_rotary_factor",
    "layer_types",
    "no_rope_layers",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "use_qk_norm",
    "num_key_value_heads",
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "head_dim",
)
# What transformers calls the classes of its attention modules; MLA is LongCat's, which has two in a layer with indices of their own.
ATTENTION = ("Attention", "MLA")
# Layers whose keys are not the tokens of the text: the model appends compressed ones, and extends additive masks by hand.
COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One self-attention module and what of it a sparse mask must respect.

    `kind` is the configuration's layer type: "full_attention" where it has none, "cross_attention" to keys of something else;
    `window` the sliding window in tokens or None; `context` the model's longest text in tokens or None; `softcap` and `sinks`
    whether the scores are capped or learned sinks join the softmax; `shared` whether layers of the model read others' keys.
    """

    index: int
    module: nn.Module
    kind: str
    window: int | None
    context: int | None
    softcap: bool
    sinks: bool
    shared: bool

    @property
    def binding_window(self) -> int | None:
        """The sliding window where a text can be longer."""
        never = self.window is None or (self.context is not None and self.window >= self.context)
        return None if never else self.window


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside `model`. Raises UserError unless it is a decoder of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"expected a transformers model, got {type(model).__name__}; of a wrapper pass the model inside, "
            "such as model.get_base_model() for PEFT"
        )
    _require_causal(model, not getattr(model.config, "is_encoder_decoder", False))
    return model.config.get_text_config()


def _require_causal(model: nn.Module, causal: bool) -> None:
    require(causal, f"{type(model).__name__} is not a causal decoder; masks are defined for causal self-attention only")


def fingerprint(model: nn.Module) -> Fingerprint:
    """The attention geometry of a transformers decoder.

    Raises UserError for models that do not use transformers' attention interface, with the reason.
    """
    indices = [layer.index for layer in attention_layers(model)]
    config = text_config(model)
    layers = attending_configs(config, indices)
    heads = {layer.num_attention_heads for layer in layers}
    require(
        len(heads) == 1,
        f"the layers of {type(model).__name__} differ in their query heads: {sorted(heads)}; a plan has one number",
    )
    return Fingerprint(
        model_type=config.model_type,
        layers=len(indices),
        heads=heads.pop(),
        kv_heads=min(kv_heads(layer) for layer in layers),
        head_dim=max(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in layers),
        config_hash=_config_hash(config),
        indices=indices,
    )


def longest_text(model: nn.Module) -> int | None:
    """The tokens that a model was made for, as far as its configuration says: its positions, or what RoPE is scaled to."""
    config: Any = model.config
    config = config.get_text_config()
    most: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = (rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0)
    return most if most is None else max(most, int(scaled))


def check_positions(model: nn.Module, tokens: int) -> None:
    """Raise UserError for texts of more tokens than a model was made for: it has no others, or never saw them in training."""
    most = longest_text(model)
    require(most is None or tokens <= most, f"{tokens} tokens are more than the model's {most} positions: use shorter lengths")


def layer_configs(config: Any) -> list[Any]:
    """Per layer, a configuration to read heads and widths from: some models (Gemma 4) have other ones in some layers."""
    own = getattr(config, "per_layer_config", None)
    return [config] * config.num_hidden_layers if own is None else list(own)


def attending_configs(config: Any, indices: Sequence[int]) -> list[Any]:
    """The configurations of these layers alone."""
    layers = layer_configs(config)
    # LongCat has more attention modules than layers, all alike.
    return [layers[index] if index < len(layers) else config for index in indices]


def kv_heads(config: Any) -> int:
    """KV heads by the configuration, of a model or of a layer."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Every self-attention module of the language model that calls the attention interface, in layer order.

    Raises UserError, with the reason, when there is none, when two share a layer and when attention is not causal.
    """
    config = text_config(model)
    require(
        not type(model).__module__.startswith("attnsieve."),
        f"{type(model).__name__} computes its attention by masks of its own, which no plan replaces: run it as it is",
    )
    found = [(_index(name, module), module) for name, module in model.named_modules() if _calls_interface(module, config)]
    modules = [(index, module) for index, module in found if index is not None]
    if not modules:
        raise UserError(_why_no_layers(model, config))
    _require_causal(model, all(getattr(module, "is_causal", True) for _, module in modules))
    layers = [_describe(module, index, config) for index, module in modules]
    indices = [layer.index for layer in layers]
    if len(set(indices)) != len(indices):
        raise UserError(f"{type(model).__name__} has several attention modules in one layer; this is not supported")
    return sorted(layers, key=lambda layer: layer.index)


def _why_no_layers(model: nn.Module, config: Any) -> str:
    name = type(model).__name__
    if any(_is_attention(module) for module in model.modules()):
        return (
            f"{name} does not use transformers' AttentionInterface: its attention is written into the model and cannot be "
            "replaced; use an architecture that does, such as Llama, Qwen3, Mistral or Gemma"
        )
    kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ["of another kind"])))
    return (
        f"{name} has no layers with attention (its layers: {kinds}), so there is nothing that a plan could make sparse: use a model "
        "that has some, such as Llama or Qwen3, or a hybrid with full_attention among its layer types"
    )


def _is_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in ATTENTION)


def _calls_interface(module: nn.Module, config: Any) -> bool:
    modeling = sys.modules.get(type(module).__module__)
    return (
        hasattr(module, "layer_idx")
        and _is_attention(module)
        and getattr(module, "config", None) is config
        and hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")
    )


def _index(name: str, module: nn.Module) -> int | None:
    """The number of a module's layer, or None. Zamba's layers share their attention's weights, and modules do not know theirs."""
    known: Any = module.layer_idx
    place = re.search(r"\.layers\.(\d+)\.", name)
    return known if known is not None and known >= 0 else int(place[1]) if place is not None else None


def _describe(module: nn.Module, index: int, config: Any) -> AttentionLayer:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else "full_attention"
    if "CrossAttention" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        kind = "cross_attention"
    require(
        kind not in COMPRESSED,
        f"layer {index} of {config.model_type} attends to compressed keys (layer type {kind}), which are no tokens of the text: "
        "such models are not supported",
    )
    softcap = getattr(module, "attn_logit_softcapping", None) is not None
    # EXAONE 4 notes its window on layers of full attention too, which neither their masks nor their caches know.
    window = None if kinds and kind == "full_attention" else getattr(module, "sliding_window", None)
    if kind == "sliding_attention" or not kinds:
        # Without layer types a window in the configuration holds for every layer, in transformers' caches too.
        window = window or getattr(config, "sliding_window", None)
    context = getattr(config, "max_position_embeddings", None)
    shared = bool(getattr(config, "num_kv_shared_layers", 0))
    return AttentionLayer(index, module, kind, window, context, softcap, hasattr(module, "sinks"), shared)


def _config_hash(config: Any) -> str:
    varying = getattr(config, "per_layer_attributes", None) or ()
    layers = layer_configs(config)
    values = {name: getattr(config, name, None) for name in HASHED if name not in varying}
    values |= {name: [getattr(layer, name, None) for layer in layers] for name in HASHED if name in varying}
    values = {name: value for name, value in values.items() if value is not None}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
