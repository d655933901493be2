"""What the attention layers of the model share: projections, QK norm, RoPE, and what a forward pass tells them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from attnsieve.attention import attend
from attnsieve.errors import require
from attnsieve.layout import Layout
from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.functional import blank
from attnsieve.nn.segments import Segments


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass. cos, sin [B or 1, T, rotary width]; segments of the key slots, None without padding and packing."""

    cos: Tensor
    sin: Tensor
    segments: Segments | None = None


class ProjectedAttention(nn.Module, ABC):
    """hidden [B, T, hidden size] to the same, through q, k, v [B, heads, T, head_dim]; a subclass mixes the values."""

    def __init__(self, config: DmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, bias = config.head_width, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, config.hidden_size, bias=bias)
        self.q_norm = LlamaRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        """The layer's output; `cache` remembers and gives back earlier keys."""
        refuse_dropout(self.config, self.training)
        width = self.config.head_width
        q = self.q_norm(split_heads(self.q_proj(hidden), width))
        k = self.k_norm(split_heads(self.k_proj(hidden), width))
        v = split_heads(self.v_proj(hidden), width)
        q, k = apply_rotary_pos_emb(q, k, now.cos, now.sin)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and RoPE return float32
        mixed: Tensor = self.o_proj(join_heads(self.mix(q, k, v, now, cache)))
        return mixed

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        """[B, Hq, T, head_dim] from q [B, Hq, T, head_dim] and the new k, v [B, Hkv, T, head_dim]."""


def split_heads(flat: Tensor, width: int) -> Tensor:
    """[B, T, H * width] to [B, H, T, width]. Raises UserError where tensor parallelism has split a head."""
    require(
        flat.shape[2] % width == 0,
        f"{flat.shape[2]} channels are no whole heads of {width}: tensor parallelism needs KV heads that its processes divide",
    )
    return flat.view(*flat.shape[:2], -1, width).transpose(1, 2)


def join_heads(heads: Tensor) -> Tensor:
    """[B, H, T, width] to [B, T, H * width]."""
    return heads.transpose(1, 2).flatten(2)


def refuse_dropout(config: DmaConfig, training: bool) -> None:
    """Raise UserError in training with attention dropout: no layer here drops attention weights."""
    dropout = config.attention_dropout
    require(not (training and dropout), f"attention_dropout={dropout} is not supported in training: set it to 0")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None,
    *,
    backend: str,
    window: int | None = None,
) -> Tensor:
    """Dense or sliding-window causal attention of the last Tq of Tk slots, within documents. [B, Hq, Tq, Dv]."""
    plain = segments is None and (window is None or window >= k.shape[2])
    if plain and q.shape[2] in (1, k.shape[2]):
        causal = q.shape[2] > 1
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    slots = k.shape[2]
    if segments is None:
        stop = torch.full((1, slots), slots, dtype=torch.int32, device=q.device)
    else:
        stop = last_slots(segments, slots).stop
        q, k, v = blank(segments, q, k, v)
    if window is not None:
        index = torch.arange(slots, dtype=torch.int32, device=q.device)
        stop = torch.minimum(stop, index + window)
    end = stop[:, None].expand(-1, k.shape[1], -1).contiguous()
    out = attend(q, k, v, Layout(slots, end, most_keys=window), backend=backend)
    assert isinstance(out, Tensor)
    return out


def last_slots(segments: Segments, slots: int) -> Segments:
    """The segments of the last slots, counted from the first of them: a sliding cache has dropped the earlier ones."""
    dropped = segments.start.shape[1] - slots
    if not dropped:
        return segments
    start, stop = segments.start[:, dropped:] - dropped, segments.stop[:, dropped:] - dropped
    return Segments(start.clamp_min(0), stop)
