"""The differentiable operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import DECODE_QUERIES, Call
from attnsieve.backends.triton.common import Places, places_of
from attnsieve.backends.triton.decode import Decode, decode
from attnsieve.backends.triton.diagonals import PrefillInParts
from attnsieve.backends.triton.forward import Prefill, prefill_of
from attnsieve.backends.triton.gradients import gradients
from attnsieve.backends.triton.scattered import scattered
from attnsieve.backends.triton.tuning import forward_tiles
from attnsieve.spans import Spans


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Output and LSE, recorded by autograd where an input needs a gradient."""
    if torch.is_grad_enabled() and call.needs_grad:
        out, lse = _Attend.apply(call, call.q, call.k, call.v, call.key_bias)
        return out, lse
    if _is_decoded(call):
        return decode(call)
    return prefill_of(call, _prefill(call))


class Repeated:
    """Calls like `call`, which has neither bias nor padding; nothing is checked, chosen or specialised any more.

    Remembers no layout: layouts keep objects of this class, and would keep themselves.
    """

    def __init__(self, call: Call) -> None:
        self._run = Decode(call) if _is_decoded(call) else _prefill(call)
        self._last: tuple[Spans, Places] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        last = self._last
        if last is None or last[0] is not spans:
            self._last = last = (spans, places_of(spans))
        return self._run(q, k, v, None, last[1])


def _prefill(call: Call) -> Prefill | PrefillInParts:
    parts = scattered(call)
    if parts is None:
        return Prefill(call, forward_tiles(call))
    rest = replace(call, layout=parts.rest)
    return PrefillInParts(call, Prefill(rest, forward_tiles(rest)), parts)


def _is_decoded(call: Call) -> bool:
    """Whether there are queries, and few."""
    return 0 < call.q.shape[2] <= DECODE_QUERIES and len(call.spans) > 0


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        call = replace(call, q=q, k=k, v=v, key_bias=key_bias)
        out, lse = prefill_of(call, _prefill(call))
        ctx.save_for_backward(q, k, v, key_bias, out, lse)
        ctx.rest = (call.layout, call.spans, call.scale)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, out, lse = ctx.saved_tensors
        layout, spans, scale = ctx.rest
        call = Call(q, k, v, layout, spans, scale, key_bias)
        grads = gradients(call, out, lse, torch.zeros_like(out) if d_out is None else d_out, d_lse)
        return None, grads.q, grads.k, grads.v, grads.key_bias
