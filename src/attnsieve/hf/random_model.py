"""Models of known sizes with random weights: what time and memory depend on, without a download."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from attnsieve.errors import require

_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_LLAMA_3B = _LLAMA_1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}
_LLAMA_8B = _LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
_TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.2-3b": _LLAMA_3B | {"head_dim": 128},
    "llama-3.1-8b": _LLAMA_8B,
}
_POSITIONS = 131072


def random_model(name: str, device: torch.device | str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """A Llama of the size `name` with seeded random weights, in evaluation mode; `layers` to build fewer of them.

    Raises UserError for an unknown size.
    """
    require(name in CONFIGS, f"unknown model size {name!r}; choose from {', '.join(CONFIGS)}")
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig(**(CONFIGS[name] | changes), max_position_embeddings=_POSITIONS)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model
