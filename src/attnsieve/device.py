"""Where kernels are launched, and what the place is called."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

_NOTHING = nullcontext()


@cache
def device_name(device: torch.device) -> str:
    """The name under which costs and result rows are kept: the GPU's own, or "cpu" for every CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
