"""Call: one checked request for attention, the argument of every backend."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnsieve.device import in_forward_mode
from attnsieve.layout import Layout
from attnsieve.spans import Spans

# Scores are computed in float32 at least: a scale beyond it is infinite there.
_LARGEST_SCALE = torch.finfo(torch.float32).max
# Up to this many query slots a call reads keys rather than computes: every query is decoded by itself.
DECODE_QUERIES = 8


@dataclass(frozen=True, eq=False)
class Call:
    """q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; v [B, Hkv, Tk, Dv]; key_bias [B, Hkv, Tk] or None; see `attnsieve.attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    spans: Spans
    scale: float
    key_bias: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def whole(self) -> bool:
        """Whether the host knows that every batch row is one sequence which fills all slots."""
        return self.spans.whole == (self.q.shape[0], self.q.shape[2], self.k.shape[2])

    @property
    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.key_bias)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @property
    def has_tangents(self) -> bool:
        """Whether an input is a dual tensor, whose tangents kernels do not see."""
        tensors = (self.q, self.k, self.v, self.key_bias)
        return in_forward_mode() and any(
            tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
        )


def problem_of_scale(scale: object) -> str | None:
    """What is wrong with the number that scores are multiplied by."""
    if isinstance(scale, Real) and not isinstance(scale, bool) and abs(scale) <= _LARGEST_SCALE:  # type: ignore[operator]
        return None
    return f"scale must be a finite number in float32, got {scale!r}"


def why_not_plain(call: Call, kernels: str) -> str | None:
    """Why kernels that know neither bias nor padding, and give no gradients, cannot serve a call; None if they can."""
    if call.q.numel() == 0:
        # Without queries torch's kernel for CPUs divides by zero, which ends the process.
        return f"there are no queries, which {kernels} do not expect"
    if not call.scale > 0:
        # They mask scores before they are scaled: -inf times that is NaN or infinity.
        return f"{kernels} take positive scales, got {call.scale}"
    if call.key_bias is not None:
        return f"{kernels} add no key bias"
    if call.needs_grad:
        return f"{kernels} are run without gradients (through the LSE they have none)"
    if call.has_tangents:
        return f"{kernels} are run without gradients, forward-mode ones too"
    if not call.whole:
        return f"the sequences do not fill their batch rows (padding or packing), which {kernels} cannot see"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied first where others' kernels would misread it: they take for granted, and do not always check, that rows are
    contiguous and begin at multiples of 16 bytes."""
    *steps, last = tensor.stride()
    bits = tensor.data_ptr()
    for step in steps:
        bits |= step * tensor.element_size()
    return tensor if last == 1 and bits % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
