"""Where kernels are launched, what is under way there, and what the place is called."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NOTHING = nullcontext()
T = TypeVar("T")


@cache
def device_name(device: torch.device) -> str:
    """The name under which costs and result rows are kept: the GPU's own, or "cpu" for every CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run beside each other without sharing a processor's memory; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches there whatever its tensors are on, as models spread over GPUs have."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def is_capturing(tensor: Tensor) -> bool:
    """Whether a graph records what is launched on the tensor's device: nothing is computed before the graph is replayed."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(tensor: Tensor) -> int:
    """The stream on which kernels for the tensor are launched, 0 on a CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


class PerStream(Generic[T]):
    """Small tensors that follow from sizes alone, which take longer to launch than to compute: made once per sizes, device and stream.
    Another stream would not wait until they are written. They are nobody else's, so that nothing is written to them."""

    MOST = 64

    def __init__(self, build: Callable[..., T]) -> None:
        self._build = build
        self.known: dict[Hashable, T] = {}

    def __call__(self, near: Tensor, *sizes: int) -> T:
        """build(device, *sizes) for the device of `near` and the stream that is current there."""
        # A graph computes nothing before it is replayed, and is replayed when what is known here may be gone. Within torch.func's
        # transforms, and where torch only pretends to compute, tensors are not what they seem.
        if (
            is_capturing(near)
            or torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return self._build(near.device, *sizes)
        key = (near.device, stream_of(near), *sizes)
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= self.MOST:
                self.known.clear()
            found = self.known[key] = self._build(near.device, *sizes)
        return found


def in_forward_mode() -> bool:
    """Whether forward-mode gradients are under way: inputs may be dual tensors, whose tangents kernels would lose. Torch has no
    public name for it, and asking every tensor takes longer than a short call may."""
    return forward_ad._current_level >= 0


def padded(width: int) -> int:
    """The next power of two from 16: sides that the matrix units take. Triton's own function takes microseconds."""
    return max(16, 1 << (width - 1).bit_length())
