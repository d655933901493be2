"""Which calls the kernels for Hopper GPUs serve: `hopper_forward` and `hopper_keys`, in Gluon, Triton's language of explicit layouts,
copies and waits. All else is Triton's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import LISTED_ALL
from attnsieve.backends.triton.geometry import Geometry
from attnsieve.backends.triton.schedule import Schedule
from attnsieve.device import multiprocessors
from attnsieve.launching import is_known_triton


def serves(call: Call, built: Schedule) -> bool:
    """Whether they compute with this call's listed keys, which must be all that rows keep by `end`.

    Rows of tensors must be aligned as well (`is_aligned`).
    """
    width = call.q.shape[-1]
    return (
        is_there(call)
        and call.q.element_size() == 2
        and width == call.v.shape[-1]
        and width in (64, 128)
        and built.listed == LISTED_ALL.value
        and built.mask.cut is None
    )


def is_there(call: Call) -> bool:
    """Whether the call's device is such a GPU, and Triton the one that the kernels were written for."""
    return _capability(call.q.device) == (9, 0) and is_known_triton()


def is_wide_enough(call: Call) -> bool:
    """Whether prefill's kernel is faster than Triton's at the call's width."""
    return call.q.shape[-1] >= 128


def is_aligned(x: Tensor) -> bool:
    """Whether Triton knows that rows begin at multiples of 16 bytes, or `common.rows_of` makes it so: else they cannot be copied."""
    return x.stride(-1) != 1 or (x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1]))


def programs(geometry: Geometry) -> int:
    """Programs that go through all query tiles of a call."""
    return min(geometry.total, multiprocessors(geometry.call.q.device))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
