"""FlashAttention-4 backend (extra `fa4`): dense, window and tile-list kernels for Hopper. Imported when a call runs."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attnsieve.backends.call import Call, why_not_plain
from attnsieve.backends.facts import facts

# Side of the tiles that FA4 takes on Hopper at these widths; its lists must use the same.
TILE = 128
WIDEST = 128
_DTYPES = (torch.float16, torch.bfloat16)
_HOPPER = 9


def why_not(call: Call) -> str | None:
    """The reason why this backend cannot serve `call`, or None."""
    return _why_not_here(call) or _why_not_inputs(call) or _why_not_layout(call)


def _why_not_here(call: Call) -> str | None:
    if not call.q.is_cuda:
        return f"FlashAttention-4 needs a CUDA device, the tensors are on {call.q.device}"
    if not installed():
        return "FlashAttention-4 is not installed (pip install attnsieve[fa4])"
    major, minor = torch.cuda.get_device_capability(call.q.device)
    if major != _HOPPER:
        return f"FlashAttention-4's tile lists are served on Hopper GPUs (9.0) only, this one is {major}.{minor}"
    return None


@cache
def installed() -> bool:
    """Whether flash_attn.cute can be imported."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def _why_not_inputs(call: Call) -> str | None:
    width, v_width = call.q.shape[-1], call.v.shape[-1]
    if call.q.dtype not in _DTYPES:
        return f"FlashAttention-4 takes float16 and bfloat16, got {call.q.dtype}"
    if width != v_width or width % 8 or width > WIDEST:
        return f"head widths must be equal, a multiple of 8 and at most {WIDEST}, got {width} and {v_width}"
    return why_not_plain(call, "FlashAttention-4's kernels")


def _why_not_layout(call: Call) -> str | None:
    layout, known = call.layout, facts(call.layout)
    if known.dense or known.window is not None:
        return None
    if layout.corner is not None:
        return "the layout has a captured corner, which tile lists cannot express"
    if layout.passing or layout.most_keys is not None or layout.sequences > 1:
        return "the keys are chosen from the input: lists of tiles would have to be built and read back for one call"
    blocks = layout.blocks
    if blocks is not None and (not known.only_blocks or blocks.rows != blocks.keys or blocks.rows % TILE):
        return f"blocks must stand alone, square and a multiple of {TILE} wide; the layout's are {blocks.rows} x {blocks.keys}"
    if (call.k.shape[2] - call.q.shape[2]) % TILE:
        return f"a chunk must start at a multiple of {TILE} positions, it starts at {call.k.shape[2] - call.q.shape[2]}"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D] in q's dtype, LSE [B, Hq, Tq] in float32."""
    from attnsieve.backends.fa4.kernel import attend

    return attend(call)
