"""Choosing on a GPU: the exact attention of probed queries in fused kernels, which never write a score to memory.

Every function here has its oracle in plain torch, in the files of `attnsieve.selection`: same rule, another order of sums. Triton
is imported when a call is served, not before. Sums have a fixed order: a choice repeats bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

_WIDEST = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves(x: Tensor) -> bool:
    """Whether kernels run where this tensor is; else plain torch chooses."""
    return x.is_cuda and _has_triton()


def serves_heads(q: Tensor) -> bool:
    """`serves`, for kernels that multiply queries [S, H, nq, D]."""
    return serves(q) and q.dtype in _DTYPES and q.shape[-1] <= _WIDEST


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None
