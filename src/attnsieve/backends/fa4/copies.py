"""K and V with listed keys copied in front."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 64


@triton.jit
def _copy_kernel(
    source,
    target,
    index,
    s_batch,
    s_head,
    s_token,
    heads,
    front,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    """target [B, H, front + tokens, D]: the keys of `source` numbered by index int32 [H, front], then all of them."""
    i_row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    ok = slot < front + tokens
    listed = tl.load(index + i_row % heads * front + slot, mask=slot < front, other=0)
    # Of positions that are still to come nothing is kept.
    token = tl.where(slot < front, tl.minimum(listed, tokens - 1), slot - front).to(tl.int64)
    o_d = tl.arange(0, DP)
    mask = ok[:, None] & (o_d < D)[None, :]
    p_source = source + i_row // heads * s_batch + i_row % heads * s_head
    value = tl.load(p_source + token[:, None] * s_token + o_d[None, :], mask=mask)
    p_target = target + (i_row * (front + tokens) + slot)[:, None] * D + o_d[None, :]
    tl.store(p_target, value, mask=mask)


def with_keys_in_front(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, F + T, D] of x [B, H, T, D] and index int32 [H, F] of its keys; numbers from T on stand for keys of any value."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, heads, tokens, width), front = x.shape, index.shape[1]
    out = torch.empty(batch, heads, front + tokens, width, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(front + tokens, _STEP), batch * heads)
    widths = {"D": width, "DP": int(triton.next_power_of_2(width)), "STEP": _STEP}
    _copy_kernel[grid](x, out, index, x.stride(0), x.stride(1), x.stride(2), heads, front, tokens, **widths, num_warps=4)
    return out
