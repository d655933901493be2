"""Why a model became NaN: what its training steps leave in tensors, which a CUDA graph can write to as well."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnsieve.nn.layers import DmaAttention
from attnsieve.nn.layers.base import split_heads
from attnsieve.nn.scores import key_scores


class Health:
    """Loss and norms of the last step; once one of them was not finite, for ever those of that step.

    bias: for each layer of DMA the largest A * softplus(dt), the logarithm of the largest bias, of the last batch where it is finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        layers = [module for module in model.modules() if isinstance(module, DmaAttention)]
        device = next(model.parameters()).device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)  # the finite ones
        self.loss = torch.zeros((), device=device)
        self.norms = torch.zeros(len(self.parameters), device=device)  # of gradients before clipping
        self.before = torch.zeros((), device=device)  # the norm of all of them at the last finite step
        self.bias = torch.zeros(len(layers), device=device)
        self.looks: list[list[float]] = []
        for layer, place in zip(layers, self.bias, strict=True):
            layer.v_proj.register_forward_hook(_watch(layer, place))

    def clip(self, loss: Tensor) -> None:
        """Clip the gradients of a step to norm 1, and keep what they were."""
        norms = torch.stack([loss.new_zeros(()) if p.grad is None else p.grad.norm() for p in self.parameters.values()])
        norm = norms.norm()
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), 1.0, norm)
        for kept, now in ((self.loss, loss.detach()), (self.norms, norms)):
            kept.copy_(torch.where(self.finite, now, kept))
        self.finite &= loss.isfinite() & norm.isfinite()
        self.before.copy_(torch.where(self.finite, norm, self.before))
        self.steps += self.finite

    def restart(self) -> None:
        """Count steps from here on."""
        self.steps.zero_()

    def look(self) -> None:
        """Write the bias down. Waits for the device."""
        self.looks.append([round(bias, 2) for bias in self.bias.tolist()])

    def told(self, *, diverged: bool) -> dict[str, Any]:
        """Of a row. `bias`: of DMA, at each look.

        Of a model that diverged also the first step that was not finite, its loss (None: not finite, as JSON has no NaN), the norm of
        the step before, and the parameters whose gradients were not finite.
        """
        numbers: dict[str, Any] = {"bias": self.looks} if len(self.bias) else {}
        if not diverged:
            return numbers
        loss = float(self.loss)
        broken = [name for name, good in zip(self.parameters, self.norms.isfinite().tolist(), strict=True) if not good]
        return numbers | {
            "diverged": True,
            "diverged_at": int(self.steps) + 1,
            "diverged_loss": loss if math.isfinite(loss) else None,
            "norm_before": float(self.before),
            "broken": broken if len(broken) < len(self.parameters) else "all",
        }


def _watch(layer: DmaAttention, place: Tensor) -> Any:
    """A hook that keeps the largest logarithm of a bias in `place`."""

    @torch.no_grad()
    def hook(module: nn.Module, inputs: Any, flat: Tensor) -> None:
        if layer.training:
            v = split_heads(flat, layer.config.head_width)
            bias, _ = key_scores(v, layer.dt_proj.weight, layer.dt_proj.bias, layer.A, exponential=False)
            largest = bias.amax()
            place.copy_(torch.where(largest.isfinite(), largest, place))

    return hook
