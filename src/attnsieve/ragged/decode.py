"""Who computes the decode steps over ragged storage."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attnsieve.backends import ragged as portable
from attnsieve.backends import triton
from attnsieve.backends.ragged import Index, Memory
from attnsieve.errors import UserError, require

BACKENDS = ("auto", "portable", "triton")
# q [B, Hq, 1, D], k [B, Hkv, 1, D], v [B, Hkv, 1, Dv] -> out, LSE.
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def step_of(q: Tensor, v: Tensor, memory: Memory, index: Index, scale: float, backend: str) -> Step:
    """What stores one token per row and attends to what it keeps, for tensors like q and v; see `RaggedStore.step`. Raises
    UserError for backends that are unknown or cannot serve it."""
    require(backend in BACKENDS, f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    reason = triton.why_not_tensors(q, v, scale)
    if backend == "triton" and reason is not None:
        raise UserError(f"backend 'triton' cannot serve this call: {reason}")
    if backend == "triton" or (backend == "auto" and q.is_cuda and reason is None):
        from attnsieve.backends.triton import ragged as kernels

        return kernels.Step(q, memory, index, scale)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        portable.append(memory, index, k, v)
        return portable.attend(q, memory, index, scale)

    return step
