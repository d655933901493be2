"""What DMA learns about a key from its token's values: a score to select by and a bias to attend with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.errors import require


def key_scores(v: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """delta and sigma, both [B, Hkv, n] (arXiv 2508.02124, Eq. 3 and 4):

        dt[h, j] = dt_weight[h] . (the values of all KV heads of token j) + dt_bias[h]
        delta    = exp(a * softplus(dt)), differentiable       sigma = sign(a) * dt in float32, detached

    v [B, Hkv, n, Dv]; dt_weight [Hkv, Hkv * Dv]; dt_bias [Hkv] or None; a [Hkv]. delta is float32 (float64 for float64
    values) also under autocast: in bf16 thousands of keys share a few dozen scores. sigma orders keys as delta does,
    without the ties that exp and softplus add; a = 0 ties all keys, and the most recent win.
    """
    _check(v, dt_weight, dt_bias, a)
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        bias = None if dt_bias is None else dt_bias.to(work)
        dt = F.linear(v.transpose(1, 2).flatten(2).to(work), dt_weight.to(work), bias).transpose(1, 2)
        a = a.to(work)[:, None]
        return torch.exp(a * F.softplus(dt)), (a.sign() * dt).detach().float()


def _check(v: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, a: Tensor) -> None:
    require(v.ndim == 4, f"v must be [batch, KV heads, tokens, width], got {tuple(v.shape)}")
    heads, width = v.shape[1], v.shape[3]
    for name, tensor, shape in (
        ("dt_weight", dt_weight, (heads, heads * width)),
        ("dt_bias", dt_bias, (heads,)),
        ("A", a, (heads,)),
    ):
        good = tensor is None or tuple(tensor.shape) == shape
        require(
            good, f"{name} must have shape {shape} for v {tuple(v.shape)}, got {tensor is not None and tuple(tensor.shape)}"
        )
