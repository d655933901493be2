"""Tiny random DMA models, and the Doge models of transformers that they must equal."""

from __future__ import annotations

import torch
import transformers as tr

from attnsieve.nn import DmaConfig, DmaForCausalLM

VOCAB = 211
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def shake(model: tr.PreTrainedModel, seed: int = 0, std: float = 0.2) -> tr.PreTrainedModel:
    """Random weights large enough for attention to matter, A of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            if name.endswith(".A"):
                parameter.copy_(torch.where(torch.arange(len(parameter)) % 2 == 0, 0.6, -0.8))
            elif parameter.ndim == 2:
                parameter.copy_(noise * std)
            else:
                parameter.add_(noise * 0.1)
    return model


def dma(dtype: torch.dtype = torch.float32, **changes) -> DmaForCausalLM:
    config = DmaConfig(**{**SIZES, "keep_window_size": 8, **changes})
    return shake(DmaForCausalLM(config)).eval().to(dtype)


def doge(dtype: torch.dtype = torch.float32, **changes) -> tr.PreTrainedModel:
    config = tr.DogeConfig(**{**SIZES, "keep_window_size": 8, **changes})
    return shake(tr.AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval().to(dtype)


def distinct_tokens(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    """No token twice in a row: equal tokens have equal values in the first layer, hence tied scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([1 + torch.randperm(VOCAB - 1, generator=generator)[:n] for _ in range(batch)])
