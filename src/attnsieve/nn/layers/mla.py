"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one small latent per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.layers.base import Pass, causal_attention, join_heads, refuse_dropout, split_heads


class LatentAttention(nn.Module):
    """hidden [B, T, hidden size] to the same. The cache holds latents [B, 1, T, mla_kv_rank] and one rotated key per token.

    Each head's query and key is `head_dim` wide, from the latent and without position, plus `mla_rope_width` with RoPE,
    whose key all heads share.
    """

    def __init__(self, config: DmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, width, rope = config.num_attention_heads, config.head_width, config.mla_rope_width
        bias = config.attention_bias
        if config.mla_q_rank:
            self.q_a_proj = nn.Linear(config.hidden_size, config.mla_q_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(config.mla_q_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.mla_q_rank or config.hidden_size, heads * (width + rope), bias=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, config.mla_kv_rank + rope, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(config.mla_kv_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.mla_kv_rank, heads * 2 * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        """The layer's output; `cache` remembers and gives back earlier latents."""
        refuse_dropout(self.config, self.training)
        width, rope = self.config.head_width, self.config.mla_rope_width
        q = split_heads(self._queries(hidden), width + rope)
        latent, k_rope = self.kv_a_proj(hidden)[:, None].split([self.config.mla_kv_rank, rope], dim=-1)
        q_rope, k_rope = apply_rotary_pos_emb(q[..., width:], k_rope, now.cos, now.sin)
        latent = self.kv_a_layernorm(latent)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)
        k, v = split_heads(self.kv_b_proj(latent[:, 0]), 2 * width).split(width, dim=-1)
        q = torch.cat([q[..., :width], q_rope], dim=-1).to(v.dtype)
        k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], dim=-1).to(v.dtype)
        out = causal_attention(q, k, v, now.segments, backend=self.config.attention_backend)
        mixed: Tensor = self.o_proj(join_heads(out))
        return mixed

    def _queries(self, hidden: Tensor) -> Tensor:
        if self.config.mla_q_rank:
            hidden = self.q_a_layernorm(self.q_a_proj(hidden))
        queries: Tensor = self.q_b_proj(hidden)
        return queries
