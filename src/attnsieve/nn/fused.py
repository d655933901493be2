"""DMA's kernels, beside torch.compile and tensor parallelism. Triton is imported when one of them is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from attnsieve.device import on_device_of
from attnsieve.nn.segments import Segments

_WIDEST = 256


def can_fuse(v: Tensor, dt_weight: Tensor) -> bool:
    """Whether `fused_scores` serves `key_scores`: what torch.compile fuses itself, processes that share heads, and float64 are not."""
    plain = v.is_cuda and v.dtype != torch.float64 and v.shape[3] <= _WIDEST and v.numel() > 0
    return plain and not isinstance(dt_weight, DTensor) and not torch.compiler.is_compiling()


def fused_scores(v: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, a: Tensor, exponential: bool) -> tuple[Tensor, Tensor]:
    """`key_scores` on a GPU, by `attnsieve.nn.scores_triton`."""
    from attnsieve.nn.scores_triton import FusedScores

    with on_device_of(v):
        delta, sigma = FusedScores.apply(v, dt_weight, dt_bias, a, exponential)
    return delta, sigma


def fused_ends(
    sigma: Tensor, segments: Segments | None, budget: int, window: int = 0, sinks: int = 0, union: bool = False
) -> Tensor:
    """`SelectionRule.ends` of scores on a GPU, by `attnsieve.nn.selection_triton`; NaN is not looked for."""
    start, stop = (None, None) if segments is None else (segments.start, segments.stop)
    run = _ends_in_graph if torch.compiler.is_compiling() else _ends
    return run(sigma.detach(), start, stop, budget, window, sinks, union)


def _ends(
    sigma: Tensor, start: Tensor | None, stop: Tensor | None, budget: int, window: int, sinks: int, union: bool
) -> Tensor:
    from attnsieve.nn.selection_triton import ends

    with on_device_of(sigma):
        return ends(sigma, start, stop, budget, window, sinks, union)  # type: ignore[no-any-return]


# For torch.compile one operation: how many levels of blocks there are is decided on the host.
_ends_in_graph = torch.library.custom_op("attnsieve::selection_ends", _ends, mutates_args=())
_ends_in_graph.register_fake(lambda sigma, *rest: torch.empty(sigma.shape, dtype=torch.int32, device=sigma.device))
