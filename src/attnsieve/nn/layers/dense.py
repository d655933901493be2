"""Dense causal attention: MHA, MQA and GQA differ in the number of KV heads only."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from attnsieve.nn.layers.base import Pass, ProjectedAttention, causal_attention


class DenseAttention(ProjectedAttention):
    """Every earlier key; for "mha", "mqa" and "gqa"."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return causal_attention(q, k, v, now.segments, backend=self.config.attention_backend)
