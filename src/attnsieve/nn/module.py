"""Dynamic mask attention as a module on q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsieve.nn.cache import BoundedCache
from attnsieve.nn.functional import dynamic_mask_attention
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule
from attnsieve.spans import Spans


class DynamicMaskAttention(nn.Module):
    """Causal attention that keeps the `keep_window_size` best keys per row, by a score learned from the values.

    Use it in place of `scaled_dot_product_attention(q, k, v, is_causal=True)`. Parameters, named as in Doge: `dt_proj`
    (weight [Hkv, Hkv * Dv], bias [Hkv] or none), initialised N(0, 0.02), and `A` [Hkv], initialised to `initial_A`. At 0 all
    keys tie, so a row keeps its newest keys, and only A gets a gradient at first. `exponential` as in `key_scores`.
    """

    def __init__(
        self,
        kv_heads: int,
        value_width: int,
        keep_window_size: int,
        *,
        window: int = 0,
        sinks: int = 0,
        union: bool = False,
        bias: bool = False,
        initial_A: float = 0.0,
        exponential: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.rule = SelectionRule(keep_window_size, window, sinks, union)
        self.exponential, self.backend = exponential, backend
        self.dt_proj = nn.Linear(kv_heads * value_width, kv_heads, bias=bias)
        self.A = nn.Parameter(torch.full((kv_heads,), float(initial_A)))
        nn.init.normal_(self.dt_proj.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.dt_proj.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spans: Spans | Segments | None = None,
        cache: BoundedCache | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """[B, Hq, Tq, Dv]; arguments and errors as in `dynamic_mask_attention`."""
        return dynamic_mask_attention(
            q,
            k,
            v,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A=self.A,
            keep_window_size=self.rule.keep_window_size,
            window=self.rule.window,
            sinks=self.rule.sinks,
            union=self.rule.union,
            exponential=self.exponential,
            spans=spans,
            cache=cache,
            scale=scale,
            backend=self.backend,
        )

    def cache(self) -> BoundedCache:
        """An empty decode cache for this layer."""
        return BoundedCache(self.rule)

    def extra_repr(self) -> str:
        return f"{self.rule}, backend={self.backend!r}"
