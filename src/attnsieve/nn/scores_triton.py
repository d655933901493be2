"""`key_scores` on a GPU: one pass over the values, and one for the gradients.

Products of bfloat16 values lose nothing that float32 would keep: a float32 weight is the sum of three bfloat16 numbers, and tensor
cores add products in float32. A token's score does not depend on how many tokens a call has.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.device import padded
from attnsieve.launching import launch

# Tokens at a time, and programs that share the tokens of a head in the backward pass.
_TOKENS = 64
_SHARES = 64


class Parameters(NamedTuple):
    """dt_weight [H, H * Dv] and elements from row to row, dt_bias [H] or None, A [H]."""

    weight: Any
    s_weight: Any
    bias: Any
    a: Any


class FusedScores(torch.autograd.Function):
    """v [B, H, n, Dv], dt_weight, dt_bias, A -> delta and sigma, float32 [B, H, n]; see `key_scores`."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, exponential: bool
    ) -> tuple[Tensor, Tensor]:
        batch, heads, n, _ = v.shape
        v = v if v.stride(-1) == 1 else v.contiguous()
        dt, delta, sigma = torch.empty(3, batch, heads, n, dtype=torch.float32, device=v.device).unbind()
        launch(
            _scores_kernel,
            (triton.cdiv(n, _TOKENS), batch),
            v,
            *v.stride()[:3],
            _parameters(weight, bias, a),
            dt,
            delta,
            sigma,
            n,
            exponential,
            **_sizes(v),
            num_stages=3,
        )
        ctx.save_for_backward(v, weight, bias, a, dt)
        ctx.exponential = exponential
        ctx.mark_non_differentiable(sigma)
        ctx.set_materialize_grads(False)
        return delta, sigma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_delta: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the values has their dtype, with products in it; those of the parameters are summed in float32."""
        if d_delta is None:
            return None, None, None, None, None
        v, weight, bias, a, dt = ctx.saved_tensors
        batch, heads, n, width = v.shape
        shares = min(_SHARES, triton.cdiv(n, _TOKENS))
        d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        parts = torch.empty(batch * shares, heads * heads * width + 2 * heads, dtype=torch.float32, device=v.device)
        launch(
            _gradients_kernel,
            (shares, heads, batch),
            v,
            *v.stride()[:3],
            _parameters(weight, bias, a),
            dt,
            d_delta.contiguous(),
            d_v,
            parts,
            n,
            ctx.exponential,
            **_sizes(v),
            num_warps=8,
        )
        d_weight, d_bias, d_a = parts.sum(0).split((heads * heads * width, heads, heads))
        return (
            d_v,
            d_weight.view_as(weight).to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            d_a.to(a.dtype),
            None,
        )


def _parameters(weight: Tensor, bias: Tensor | None, a: Tensor) -> Parameters:
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    return Parameters(weight, weight.stride(0), None if bias is None else bias.contiguous(), a.contiguous())


def _sizes(v: Tensor) -> dict[str, int]:
    heads, width = v.shape[1], v.shape[3]
    return {"H": heads, "HP": padded(heads), "D": width, "DP": padded(width), "STEP": _TOKENS}


@triton.jit
def _add_product(acc, tokens, exact, LEFT: tl.constexpr):
    """acc + exact tokens with LEFT, else acc + tokens exact; `exact` is float32 and keeps its precision."""
    if tokens.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            part = exact.to(tl.bfloat16)
            acc = tl.dot(part, tokens, acc) if LEFT else tl.dot(tokens, part, acc)
            exact -= part.to(tl.float32)
        return acc
    else:
        wide = tokens.to(tl.float32)
        if LEFT:
            return tl.dot(exact, wide, acc, input_precision="ieee")
        else:
            return tl.dot(wide, exact, acc, input_precision="ieee")


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last bits also where exp(x) vanishes beside 1."""
    small = tl.exp(-tl.abs(x))
    total = 1.0 + small
    log = tl.where(total == 1.0, small, tl.log(total) * (small / tl.where(total == 1.0, 1.0, total - 1.0)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def _scores_kernel(
    p_v,
    s_batch,
    s_head,
    s_token,
    parameters,
    p_dt,
    p_delta,
    p_sigma,
    n,
    EXPONENTIAL: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    r, o_d = tl.arange(0, HP), tl.arange(0, DP)
    p_tokens = p_v + i_b * s_batch + (slot.to(tl.int64) * s_token)[:, None] + o_d[None, :]
    p_weight = parameters.weight + (r * parameters.s_weight)[:, None] + o_d[None, :]
    ok, of_head = (slot < n)[:, None] & (o_d < D)[None, :], (r < H)[:, None] & (o_d < D)[None, :]
    acc = tl.zeros([STEP, HP], tl.float32)
    for h in range(0, H):
        tokens = tl.load(p_tokens, mask=ok, other=0.0)
        weight = tl.load(p_weight + h * D, mask=of_head, other=0.0).to(tl.float32)
        acc = _add_product(acc, tokens, tl.trans(weight), False)
        p_tokens += s_head
    dt = tl.trans(acc)
    if parameters.bias is not None:
        dt += tl.load(parameters.bias + r, mask=r < H, other=0.0).to(tl.float32)[:, None]
    a = tl.load(parameters.a + r, mask=r < H, other=0.0).to(tl.float32)[:, None]
    delta = a * _softplus(dt)
    if EXPONENTIAL:
        delta = tl.exp(delta)
    sign = tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, a))
    at = (i_b * H + r)[:, None] * n + slot[None, :]
    inside = (r < H)[:, None] & (slot < n)[None, :]
    tl.store(p_dt + at, dt, mask=inside)
    tl.store(p_delta + at, delta, mask=inside)
    tl.store(p_sigma + at, sign * dt, mask=inside)


@triton.jit
def _gradients_kernel(
    p_v,
    s_batch,
    s_head,
    s_token,
    parameters,
    p_dt,
    p_d_delta,
    p_d_v,
    p_parts,
    n,
    EXPONENTIAL: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradients of one head's values; and a share of the sums over tokens: of its columns of the weight, of the bias and of A."""
    share, h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, o_d = tl.arange(0, HP), tl.arange(0, DP)
    real = r < H
    of_head = real[:, None] & (o_d < D)[None, :]
    weight = tl.load(parameters.weight + (r * parameters.s_weight + h * D)[:, None] + o_d[None, :], mask=of_head, other=0.0)
    a = tl.load(parameters.a + r, mask=real, other=0.0).to(tl.float32)[:, None]
    d_weight = tl.zeros([HP, DP], tl.float32)
    d_bias, d_a = tl.zeros([HP], tl.float32), tl.zeros([HP], tl.float32)
    p_tokens = p_v + i_b * s_batch + h.to(tl.int64) * s_head
    p_d_tokens = p_d_v + (i_b * H + h) * n * D
    for x in range(share * STEP, n, tl.num_programs(0) * STEP):
        slot = x + tl.arange(0, STEP)
        at = (i_b * H + r)[:, None] * n + slot[None, :]
        inside = real[:, None] & (slot < n)[None, :]
        dt = tl.load(p_dt + at, mask=inside, other=0.0)
        grad = tl.load(p_d_delta + at, mask=inside, other=0.0)
        soft = _softplus(dt)
        if EXPONENTIAL:
            grad *= tl.exp(a * soft)
        d_dt = grad * a * tl.sigmoid(dt)
        d_a += tl.sum(grad * soft, 1)
        d_bias += tl.sum(d_dt, 1)
        ok = (slot < n)[:, None] & (o_d < D)[None, :]
        o_tokens = slot.to(tl.int64)[:, None]
        tokens = tl.load(p_tokens + o_tokens * s_token + o_d[None, :], mask=ok, other=0.0)
        d_weight = _add_product(d_weight, tokens, d_dt, True)
        d_tokens = tl.dot(tl.trans(d_dt.to(tokens.dtype)), weight.to(tokens.dtype), input_precision="ieee")
        tl.store(p_d_tokens + o_tokens * D + o_d[None, :], d_tokens.to(tokens.dtype), mask=ok)
    p_part = p_parts + (i_b * tl.num_programs(0) + share) * (H * H * D + 2 * H)
    tl.store(p_part + (r * H * D + h * D)[:, None] + o_d[None, :], d_weight, mask=of_head)
    tl.store(p_part + H * H * D + r, d_bias, mask=real & (h == 0))
    tl.store(p_part + H * H * D + H + r, d_a, mask=real & (h == 0))
