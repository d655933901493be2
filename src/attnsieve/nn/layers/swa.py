"""Sliding-window attention: the newest keys (Beltagy et al., arXiv 2004.05150; Mistral, arXiv 2310.06825)."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from attnsieve.nn.layers.base import Pass, ProjectedAttention, causal_attention


class SlidingWindowAttention(ProjectedAttention):
    """The newest `sliding_window` keys, the query's own included."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, now: Pass, cache: Cache | None) -> Tensor:
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        window, backend = self.config.sliding_window, self.config.attention_backend
        return causal_attention(q, k, v, now.segments, window=window, backend=backend)
