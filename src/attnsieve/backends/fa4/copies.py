"""K and V with listed keys copied in front."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.triton.common import rows_of
from attnsieve.backends.triton.launch import Launch

_STEP = 64


@triton.jit
def _copy_kernel(
    source,
    target,
    index,
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
    p_source = source.p + i_row // heads * source.s_batch + i_row % heads * source.s_head
    value = tl.load(p_source + token[:, None] * source.s_row + o_d[None, :], mask=mask)
    p_target = target + (i_row * (front + tokens) + slot)[:, None] * D + o_d[None, :]
    tl.store(p_target, value, mask=mask)


class KeysInFront:
    """Copies x [B, H, T, D] of this shape, with the keys that `index` int32 [H, F] numbers in front; numbers from T on stand for
    keys of any value."""

    def __init__(self, shape: torch.Size, index: Tensor) -> None:
        batch, heads, tokens, width = shape
        front = index.shape[1]
        self._shape, self._index = (batch, heads, front + tokens, width), index
        grid = (triton.cdiv(front + tokens, _STEP), batch * heads, 1)
        widths = {"D": width, "DP": int(triton.next_power_of_2(width)), "STEP": _STEP}
        self._launch = Launch(_copy_kernel, grid, heads, front, tokens, **widths, num_warps=4)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, F + T, D]."""
        out = x.new_empty(self._shape)
        self._launch(rows_of(x), out, self._index)
        return out
