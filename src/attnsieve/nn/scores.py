"""What DMA learns about a key from its token's values: a score to select by and a bias to attend with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from attnsieve.errors import NotFiniteError, require
from attnsieve.nn.fused import can_fuse, fused_scores
from attnsieve.nn.parallel import own, sum_for_own_heads


def key_scores(
    v: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, a: Tensor, *, exponential: bool = True
) -> tuple[Tensor, Tensor]:
    """delta and sigma, both [B, Hkv, n] (arXiv 2508.02124, Eq. 3 and 4):

        dt[h, j] = dt_weight[h] . (the values of all KV heads of token j) + dt_bias[h]
        delta    = exp(a * softplus(dt)), differentiable       sigma = sign(a) * dt in float32, detached

    v [B, Hkv, n, Dv]; dt_weight [Hkv, Hkv * Dv]; dt_bias [Hkv] or None; a [Hkv]. delta is float32 (float64 for float64
    values) also under autocast: in bf16 thousands of keys share a few dozen scores. sigma orders keys as delta does,
    without the ties that exp and softplus add; a = 0 ties all keys, and the most recent win. `exponential=False`: the bias is
    a * softplus(dt) itself, as in examples of the authors' kernels; the order is the same.

    Raises UserError for shapes that do not fit and, on a CPU, for a bias that overflows.

    Tensor parallelism: with DTensors (dt_weight sharded by columns, a by heads) v, delta and sigma are those of this
    process's heads.
    """
    _check(v, dt_weight, dt_bias, a)
    if can_fuse(v, dt_weight):
        return fused_scores(v, dt_weight, dt_bias, a, exponential)
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        dt = _project_all_heads(v.transpose(1, 2).flatten(2), dt_weight, work).transpose(1, 2).contiguous()
        if dt_bias is not None:
            dt = dt + own(dt_bias).to(work)[:, None]
        a = own(a).to(work)[:, None]
        delta, sigma = a * F.softplus(dt), (a.sign() * dt).detach().float()
        delta = torch.exp(delta) if exponential else delta
    _check_bias(delta, sigma)
    return delta, sigma


def _project_all_heads(tokens: Tensor, weight: Tensor, work: torch.dtype) -> Tensor:
    """tokens [B, n, this process's values] times weight [Hkv of all, their columns]: [B, n, this process's Hkv]."""
    if not isinstance(weight, DTensor):
        return _project(tokens, weight.to(work))
    return sum_for_own_heads(_project(tokens, weight.to_local().to(work)), weight)


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [B, n, C] times weight [Hkv, C] in the precision of `weight`: [B, n, Hkv]."""
    if tokens.is_cuda and tokens.dtype == torch.bfloat16 and tokens.shape[1] > 1:
        out: Tensor = _ProjectBfloat16.apply(tokens, weight)
        return out
    return F.linear(tokens.to(weight.dtype), weight)


class _ProjectBfloat16(torch.autograd.Function):
    """The product of bfloat16 tokens and a float32 weight without a float32 copy of the tokens.

    A float32 number is the sum of three bfloat16 numbers, and tensor cores add products of bfloat16 in float32: three
    narrow products in one pass over the tokens lose nothing that a float32 product would keep.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        """[B, n, C] and [Hkv, C] to [B, n, Hkv]."""
        ctx.save_for_backward(tokens, weight)
        flat = torch.mm(tokens.flatten(0, 1), _three_parts(weight).T, out_dtype=torch.float32)
        return flat.view(*tokens.shape[:2], 3, len(weight)).sum(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the tokens is rounded to their dtype, that of the weight is float32."""
        tokens, weight = ctx.saved_tensors
        flat = grad.flatten(0, 1)
        d_tokens = (flat.to(tokens.dtype) @ weight.to(tokens.dtype)).view_as(tokens)
        parts = torch.mm(_three_parts(flat.T), tokens.flatten(0, 1), out_dtype=torch.float32)
        return d_tokens, parts.view(3, *weight.shape).sum(0)


def _three_parts(matrix: Tensor) -> Tensor:
    """bfloat16 [3 * rows, columns]: blocks that add up to float32 `matrix`."""
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def _check(v: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, a: Tensor) -> None:
    good = isinstance(v, Tensor) and v.ndim == 4
    require(good, f"v must be a tensor [batch, KV heads, tokens, width], got {_told(v)}")
    processes = dt_weight.device_mesh.size() if isinstance(dt_weight, DTensor) else 1
    heads, width = v.shape[1] * processes, v.shape[3]
    for name, tensor, shape in (
        ("dt_weight", dt_weight, (heads, heads * width)),
        ("dt_bias", dt_bias, (heads,)),
        ("A", a, (heads,)),
    ):
        absent = name == "dt_bias" and tensor is None
        good = absent or (isinstance(tensor, Tensor) and tuple(tensor.shape) == shape)
        require(good, f"{name} must have shape {shape} for v {tuple(v.shape)}, got {_told(tensor)}")


def _told(given: object) -> str:
    """The shape of a tensor, the type of anything else."""
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def _check_bias(delta: Tensor, sigma: Tensor) -> None:
    """Raise NotFiniteError for biases that make every later output NaN; NaN scores are told by whoever selects."""
    if delta.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool((delta.isfinite() | sigma.isnan()).all()):
        raise NotFiniteError(
            "the bias of a key is infinite or NaN: exp(A * softplus(dt)) overflows beyond 88 in float32",
            "check the values, dt weights and A (or lower the learning rate)",
        )
