"""Who computes a decode step over ragged storage."""

from __future__ import annotations

from torch import Tensor

from attnsieve.backends import ragged as portable
from attnsieve.backends import triton
from attnsieve.backends.ragged import Index, Memory
from attnsieve.errors import UserError, require

BACKENDS = ("auto", "portable", "triton")


def step(q: Tensor, k: Tensor, v: Tensor, memory: Memory, index: Index, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Store one token per row and attend to what it keeps; see `RaggedStore.step`."""
    require(backend in BACKENDS, f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    reason = triton.why_not_tensors(q, v, scale)
    if backend == "triton" and reason is not None:
        raise UserError(f"backend 'triton' cannot serve this call: {reason}")
    if backend == "triton" or (backend == "auto" and q.is_cuda and reason is None):
        from attnsieve.backends.triton import ragged as kernels

        kernels.append(memory, index, k, v)
        return kernels.attend(q, memory, index, scale)
    portable.append(memory, index, k, v)
    return portable.attend(q, memory, index, scale)
