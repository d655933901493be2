"""Case: what is measured, and the inputs it is measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.bench.masks import is_dynamic, is_selected, mask, patterns_of, reselected
from attnsieve.bench.shapes import Shape
from attnsieve.errors import require
from attnsieve.layout import Layout
from attnsieve.patterns import Pattern
from attnsieve.spans import Spans

# What dense rows are named, and the pattern that they keep.
DENSE = "dense()"
# Of inputs that keys are chosen from: tokens that are alike, and the standard deviation of scores.
_ALIKE_QUERIES, _ALIKE_KEYS, _SPREAD = 256, 64, 4


@dataclass(frozen=True)
class Case:
    """One shape under one mask, bf16 on the GPU by default.

    mask: a name of `masks.MASKS`, a pattern's text or a plan's layer, see `masks.mask`. n: keys; q_len: the last queries of n,
    all by default. shared: the heads of a KV group share their mask. bias: with a key bias. shape: the model's name.
    """

    mask: str
    n: int
    q_len: int | None = None
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    shared: bool = False
    bias: bool = False
    batch: int = 1
    device: str = "cuda"
    shape: str | None = None

    @classmethod
    def of(cls, mask: str, n: int, shape: Shape, dtype: torch.dtype, device: str, batch: int = 1) -> Case:
        """A case of a named shape. A mask named with a + is shared by the heads of a KV group; DMA's come with a key bias."""
        dma = is_selected(mask)
        shared = dma or mask.endswith("+")
        heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
        return cls(mask.removesuffix("+"), n, None, *heads, dtype, shared, dma, batch, device, shape.name)

    @property
    def label(self) -> str:
        """The mask's name in rows."""
        return self.mask + ("+" if self.shared and not is_selected(self.mask) else "")

    def dense(self) -> Case:
        """The same shape with nothing left out."""
        return replace(self, mask=DENSE, shared=False, bias=False)

    @cached_property
    def choosers(self) -> tuple[Pattern, ...] | None:
        """The patterns of a mask that chooses keys from the input; of a plan's layer they are read once, not in every repeat."""
        return patterns_of(self.mask, self.q_heads) if is_dynamic(self.mask, self.q_heads) else None

    def layout(self) -> Layout:
        """The mask for all positions, where nothing has to be chosen from the input."""
        return mask(self.mask, self.n, self.kv_heads if self.shared else self.q_heads, self.device)

    def fresh(self, call: Call) -> Call:
        """`call` with nothing remembered that backends derive from its layout; keys that are chosen from the input, or selected by
        DMA, are chosen again."""
        if is_selected(self.mask):
            return replace(call, layout=reselected(self.mask, call.layout))
        return self._chosen(call) if self.choosers else replace(call, layout=replace(call.layout))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v. Where the mask chooses keys from them neighbours are alike, as in text: of independent ones whose scores
        have a standard deviation of 1 nearly every key is needed."""
        torch.manual_seed(0)
        q = self._random(self.q_heads, self.n if self.q_len is None else self.q_len, _ALIKE_QUERIES)
        k = self._random(self.kv_heads, self.n, _ALIKE_KEYS)
        v = self._independent(self.kv_heads, self.n)
        return _SPREAD * q if self.choosers else q, k, v

    def call(self) -> Call:
        """Inputs and the mask, chosen from them where it is dynamic. Raises UserError for a dynamic mask in a batch, or named with a
        +: what is measured is chosen for one sequence, by each query head's pattern."""
        call = self.unchosen()
        return self._chosen(call) if self.choosers else call

    def unchosen(self) -> Call:
        """`call` before keys are chosen, with nothing left out where they will be."""
        alone = self.batch == 1 and not self.shared
        require(alone or not self.choosers, f"{self.label} chooses from the input: measure it in a batch of 1, without +")
        layout = self.dense().layout() if self.choosers else self.layout()
        q, k, v = self.inputs()
        bias = torch.randn(self.batch, self.kv_heads, self.n, device=self.device) if self.bias else None
        spans = Spans.full(self.batch, q.shape[2], self.n, self.device)
        return Call(q, k, v, layout, spans, self.head_dim**-0.5, bias)

    def _random(self, heads: int, tokens: int, alike: int) -> Tensor:
        """[B, heads, tokens, D]; where keys are chosen, with four fifths of the variance common to every `alike` tokens."""
        own = self._independent(heads, tokens)
        if not self.choosers:
            return own
        common = self._independent(heads, -(-tokens // alike)).repeat_interleave(alike, dim=2)[:, :, :tokens]
        return math.sqrt(0.8) * common + math.sqrt(0.2) * own

    def _independent(self, heads: int, tokens: int) -> Tensor:
        return torch.randn(self.batch, heads, tokens, self.head_dim, device=self.device, dtype=self.dtype)

    def _chosen(self, call: Call) -> Call:
        from attnsieve.selection import choose

        assert self.choosers is not None
        return replace(call, layout=choose(self.choosers, call.q, call.k, spans=call.spans))
