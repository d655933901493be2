"""The differentiable operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.decode import decode
from attnsieve.backends.triton.forward import forward
from attnsieve.backends.triton.gradients import gradients
from attnsieve.backends.triton.tuning import forward_tiles

# Up to this many query slots every query is decoded by programs of its own.
_DECODE_QUERIES = 8


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Output and LSE, recorded by autograd where an input needs a gradient."""
    if torch.is_grad_enabled() and call.needs_grad:
        out, lse = _Attend.apply(call, call.q, call.k, call.v, call.key_bias)
        return out, lse
    if call.q.shape[2] <= _DECODE_QUERIES:
        return decode(call)
    return forward(call, forward_tiles(call))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        call = replace(call, q=q, k=k, v=v, key_bias=key_bias)
        out, lse = forward(call, forward_tiles(call))
        ctx.save_for_backward(q, k, v, key_bias, out, lse)
        ctx.rest = (call.layout, call.spans, call.scale)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, out, lse = ctx.saved_tensors
        layout, spans, scale = ctx.rest
        call = Call(q, k, v, layout, spans, scale, key_bias)
        grads = gradients(call, out, lse, torch.zeros_like(out) if d_out is None else d_out, d_lse)
        return None, grads.q, grads.k, grads.v, grads.key_bias
