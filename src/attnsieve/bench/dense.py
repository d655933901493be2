"""Dense causal attention by others: what sparse kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnsieve.backends import fa4
from attnsieve.backends.call import Call
from attnsieve.bench import flex
from attnsieve.errors import UserError, require


def attention(name: str) -> Callable[[Call], Tensor]:
    """The dense kernel `name`: a differentiable function of a call, which looks at nothing of its layout. The call's queries
    are all of its positions, or one. Raises UserError for an unknown name."""
    require(name in KERNELS, f"unknown baseline {name!r}; choose from {', '.join(KERNELS)}")
    return KERNELS[name]


def _sdpa(call: Call) -> Tensor:
    causal = call.q.shape[2] > 1
    return scaled_dot_product_attention(call.q, call.k, call.v, is_causal=causal, scale=call.scale, enable_gqa=True)


def _sdpa_by(backend: SDPBackend) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(call)

    return run


def _fa4(call: Call) -> Tensor:
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError:
        raise UserError("the baseline fa4 needs FlashAttention-4 (pip install attnsieve[fa4])") from None
    q, k, v = (tensor.transpose(1, 2) for tensor in (call.q, call.k, call.v))
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=call.scale, causal=True)[0]
    return out.transpose(1, 2)


KERNELS: dict[str, Callable[[Call], Tensor]] = {
    "cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa_by(SDPBackend.FLASH_ATTENTION),
    "fa4": _fa4,
    "sdpa": _sdpa,
    "flex-triton": lambda call: flex.attend(call, "TRITON"),
    "flex-flash": lambda call: flex.attend(call, "FLASH"),
}


def default_baselines(device: str) -> list[str]:
    """Dense kernels that are there: the fastest of them is what sparse ones have to beat."""
    if torch.device(device).type != "cuda":
        return ["sdpa"]
    return ["cudnn", "flash", *(["fa4"] if fa4.installed() else [])]
