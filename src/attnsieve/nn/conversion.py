"""A trained dense decoder becomes a DMA model with the same weights, to go on training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from attnsieve.errors import require
from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.modeling import DmaForCausalLM

# Architectures whose layers our frame computes exactly: model type -> whether q and k are normed.
_CONVERTIBLE = {"llama": False, "mistral": False, "qwen3": True}
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def convert(model: PreTrainedModel, keep_window_size: int, *, seed: int = 0, **changes: Any) -> DmaForCausalLM:
    """A copy of a dense Llama, Mistral or Qwen3 model with DMA layers, in its dtype and on its device.

    `dt_proj` is drawn with `seed`; `changes` are fields of DmaConfig (window, sinks, initial_A, ...). With A = 0, the
    default, the bias is the same for all keys: up to `keep_window_size` tokens the logits are those of `model`, beyond that
    those of its sliding window. Raises UserError for other architectures and for layers that slide or scale differently.
    """
    given = model.config
    known = ", ".join(sorted(_CONVERTIBLE))
    require(given.model_type in _CONVERTIBLE, f"can convert {known} models, got {given.model_type!r}")
    sliding = getattr(given, "sliding_window", None) if getattr(given, "use_sliding_window", True) else None
    require(sliding is None, f"the model has a sliding window of {sliding}: only dense layers can be converted")
    fields = {name: getattr(given, name) for name in _SHARED if hasattr(given, name)}
    fields |= {"qk_norm": _CONVERTIBLE[given.model_type], "keep_window_size": keep_window_size}
    config = DmaConfig(**(fields | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        converted = DmaForCausalLM(config)
    torch.nn.Module.to(converted, model.device, model.dtype)
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    new = ("dt_proj.weight", "dt_proj.bias", ".A", "residual")
    lost = sorted(name for name in missing if not name.endswith(new))
    require(not unexpected and not lost, f"the weights do not fit: {lost[:3]} missing, {sorted(unexpected)[:3]} unknown")
    converted.generation_config = model.generation_config
    converted.train(model.training)
    return converted
