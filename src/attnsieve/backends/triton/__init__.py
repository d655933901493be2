"""Triton backend: token-exact kernels for NVIDIA GPUs. Triton is imported when a call runs, not before."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.kinds import Again
from attnsieve.layout import Blocks

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 256
_SMALLEST_BLOCK = 16


def why_not(call: Call) -> str | None:
    """The reason why this backend cannot serve `call`, or None."""
    reason = why_not_tensors(call.q, call.v, call.scale)
    if reason is not None:
        return reason
    if call.has_tangents:
        return "Triton kernels have no forward-mode gradients"
    blocks = call.layout.blocks
    return None if blocks is None else _why_not_blocks(blocks, call)


def why_not_tensors(q: Tensor, v: Tensor, scale: float) -> str | None:
    """The reason why no kernel can serve tensors like these, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a CUDA device, the tensors are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"Triton kernels take float16, bfloat16 and float32, got {q.dtype}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16; use float32 or float16"
    if not scale > 0:
        return f"the scale must be positive, got {scale}"
    if max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return f"head widths are limited to {_WIDEST}, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def _why_not_blocks(blocks: Blocks, call: Call) -> str | None:
    sides = f"the layout's are {blocks.rows} x {blocks.keys}"
    if blocks.rows < _SMALLEST_BLOCK:
        return f"blocks must have at least {_SMALLEST_BLOCK} rows, {sides}"
    if blocks.rows == blocks.keys:
        return None
    if blocks.keys > blocks.rows or blocks.rows & (blocks.rows - 1):
        return f"blocks that are not square must be narrower than long, with a power of two of rows; {sides}"
    return "blocks that are not square have no gradients here" if torch.is_grad_enabled() and call.needs_grad else None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype, LSE [B, Hq, Tq] in float32. Scores and sums are float32, products take q's dtype."""
    from attnsieve.backends.triton.function import attend

    return attend(call)


def again(call: Call) -> Again:
    """What repeats calls of the kind of `call`, which needs no gradients; see `attnsieve.backends.kinds`."""
    from attnsieve.backends.triton.function import Repeated

    return Repeated(call)
