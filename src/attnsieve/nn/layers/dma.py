"""Dynamic mask attention as a layer of the model, parameters named as in Doge."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.functional import dynamic_mask_attention
from attnsieve.nn.generation import BoundedLayer
from attnsieve.nn.layers.base import Pass, ProjectedAttention


class DmaAttention(ProjectedAttention):
    """`dt_proj` and `A` score the keys by their values; see `dynamic_mask_attention`.

    With a `DmaCache` decoding is exact in fixed memory. A `DynamicCache` keeps the whole text and scores it anew each
    step, as Doge does.
    """

    def __init__(self, config: DmaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        kv_heads = config.kv_heads
        self.dt_proj = nn.Linear(kv_heads * config.head_width, kv_heads, bias=config.attention_bias)
        # One value per head in one tensor: FSDP2 cannot shard scalars.
        self.A = nn.Parameter(torch.zeros(kv_heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        bounded = None
        if cache is not None:
            layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            if isinstance(layer, BoundedLayer):
                bounded = layer.bounded
            else:
                k, v = cache.update(k, v, self.layer_idx)
        rule = self.config.rule
        return dynamic_mask_attention(
            q,
            k,
            v,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A=self.A,
            keep_window_size=rule.keep_window_size,
            window=rule.window,
            sinks=rule.sinks,
            union=rule.union,
            exponential=self.config.exponential_bias,
            spans=now.segments,
            cache=bounded,
            backend=self.config.attention_backend,
        )
