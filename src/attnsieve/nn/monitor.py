"""What the selection of a model does while it trains: a few numbers, taken from its own forward passes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attnsieve.nn.layers import DmaAttention
from attnsieve.nn.layers.base import split_heads
from attnsieve.nn.scores import key_scores
from attnsieve.nn.selection import SelectionRule, competition_ends


def selection_statistics(sigma: Tensor, rule: SelectionRule) -> dict[str, Tensor]:
    """Means over batch, heads and keys of scores [B, H, n], as scalars on their device.

    admitted: share of keys that ever win a place in the budget. own_token: share of rows that keep their own key (the same
    share without a window, where a key is admitted by its own row or never). distance: mean distance of a kept key in
    tokens; about half the budget for a plain window, more where the model keeps old keys.
    """
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    competition = competition_ends(sigma, rule.keep_window_size)
    life = (rule.widen(competition) - index).double()
    return {
        "admitted": (competition > index).double().mean(),
        "own_token": (life > 0).double().mean(),
        "distance": (life * (life - 1)).sum() / (2 * life.sum()),
    }


class SelectionMonitor:
    """A context manager: while `active`, every pass through `model` leaves its statistics behind, for `take`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, DmaAttention)]
        self.active = False
        self._last: dict[int, dict[str, Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> SelectionMonitor:
        self._hooks = [layer.v_proj.register_forward_hook(self._watch(layer)) for layer in self.layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, float]:
        """Means over the layers since the last call, empty if nothing was watched."""
        if not self._last:
            return {}
        rows = list(self._last.values())
        means = {f"selection/{name}": float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0] if name != "A"}
        a = torch.cat([row["A"] for row in rows])
        self._last = {}
        return means | {"A/mean": float(a.mean()), "A/min": float(a.min()), "A/max": float(a.max())}

    def _watch(self, layer: DmaAttention) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any, flat: Tensor) -> None:
            if self.active:
                v = split_heads(flat, layer.config.head_width)
                _, sigma = key_scores(v, layer.dt_proj.weight, layer.dt_proj.bias, layer.A)
                self._last[layer.layer_idx] = selection_statistics(sigma, layer.config.rule) | {"A": layer.A.detach().clone()}

        return hook
