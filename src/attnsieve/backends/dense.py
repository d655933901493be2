"""Dense backend: torch's own causal attention, for layouts that keep every causal pair."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.backends.call import Call, aligned, why_not_plain
from attnsieve.backends.facts import facts

_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CUDA_WIDEST = 256
# cuDNN's kernel is the faster one up to this width and from this many queries on; flash splits the keys of short calls.
_CUDNN_WIDEST = 128
_CUDNN_QUERIES = 64


def why_not(call: Call) -> str | None:
    """The reason why this backend cannot serve `call`, or None."""
    reason = why_not_plain(call, "torch's dense kernels") or _why_not_inputs(call)
    if reason is not None:
        return reason
    return None if facts(call.layout).dense else "the layout leaves pairs out"


def _why_not_inputs(call: Call) -> str | None:
    width, v_width = call.q.shape[-1], call.v.shape[-1]
    if width != v_width:
        return f"torch's dense kernels need equal widths, got {width} and {v_width}"
    if not call.q.is_cuda:
        return None
    if call.q.dtype not in _CUDA_DTYPES:
        return f"torch's flash kernels take float16 and bfloat16, got {call.q.dtype}"
    if width % 8 or width > _CUDA_WIDEST:
        return f"torch's flash kernels need widths that are a multiple of 8 up to {_CUDA_WIDEST}, got {width}"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D] in q's dtype, LSE [B, Hq, Tq] in float32 (float64 for float64 inputs)."""
    q, k, v = (aligned(tensor.detach()) for tensor in (call.q, call.k, call.v))
    past = k.shape[2] - q.shape[2]
    if past == 0:
        return _kernel(q, k, v, call.scale, causal=True)
    if q.shape[2] == 1:
        return _kernel(q, k, v, call.scale, causal=False)
    # torch aligns the causal triangle with the first key, chunks need the last one.
    earlier = _kernel(q, k[:, :, :past], v[:, :, :past], call.scale, causal=False)
    own = _kernel(q, k[:, :, past:], v[:, :, past:], call.scale, causal=True)
    return merge(earlier, own)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys joined: (out, LSE) of each; rows may be empty in one or in both."""
    (out_1, lse_1), (out_2, lse_2) = one, other
    lse = torch.logaddexp(lse_1, lse_2)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    out = out_1 * (lse_1 - base).exp()[..., None] + out_2 * (lse_2 - base).exp()[..., None]
    return out.to(out_1.dtype), lse


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        group = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.shape[-1] <= _CUDNN_WIDEST and q.shape[2] >= _CUDNN_QUERIES:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        out, lse = found[0], found[1]
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        out, lse = found[0], found[1]
    return out, lse.reshape(q.shape[:3])
