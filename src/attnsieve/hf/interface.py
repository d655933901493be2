"""The seam with transformers: one attention function and one mask function under one name, and state on modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from attnsieve.errors import UserError, require
from attnsieve.hf.geometry import AttentionLayer, attention_layers, text_config
from attnsieve.hf.masks import mask_function

NAME = "attnsieve"
STATE = "_attnsieve"


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of the attention interface, by transformers' names.

    query [B, Hq, Tq, D]; key [B, Hkv, Tk, D]; value [B, Hkv, Tk, Dv], after RoPE and after the cache; mask as the mask
    function or the caller made it, or None; options: every further keyword argument; past: key slots before those of `key`,
    whose keys the cache keeps to itself.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    dropout: float
    options: dict[str, Any]
    past: int = 0

    @property
    def scale(self) -> float:
        """What scores are multiplied by, 1 / sqrt(D) where the model gives nothing."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    @property
    def tokens(self) -> int:
        """Tokens of this forward pass. Gemma 4 runs layers that share keys for the last of them alone; positions count all."""
        queries = self.query.shape[2]
        positions = self.options.get("position_ids")
        return queries if positions is None else max(queries, positions.shape[-1])

    @property
    def k_slots(self) -> int:
        """Key slots that the mask speaks of."""
        return self.past + self.key.shape[2]


# What a layer does with its calls: returns the output [B, Tq, Hq, Dv], contiguous.
LayerState = Callable[[LayerCall], Tensor]


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: hands the call to the state of the module."""
    state: LayerState | None = getattr(module, STATE, None)
    if state is None:
        raise UserError(
            f'this model uses attention "{NAME}" but has no plan: use attnsieve.apply(model, plan) instead of '
            "attn_implementation, on this very model object"
        )
    return state(LayerCall(module, query, key, value, attention_mask, scaling, dropout, options)), None


def attach(model: PreTrainedModel, make: Callable[[AttentionLayer], LayerState]) -> Callable[[], None]:
    """Give every attention layer the state that `make` returns and switch the model to it. Returns what undoes both.

    Until then every call of a layer is refused once somebody else has switched the model (`_refuse_other_attention`). Raises
    UserError for models that do not use the interface or have states already.
    """
    layers = attention_layers(model)
    require(
        not any(hasattr(layer.module, STATE) for layer in layers),
        "attnsieve is already active on this model: leave the with block or call remove() on the earlier handle first",
    )
    states = {layer: make(layer) for layer in layers}
    # Layers count calls and read masks, which a compiled graph cannot: the graph breaks there instead of tracing.
    AttentionInterface.register(NAME, torch.compiler.disable(attention_function))
    AttentionMaskInterface.register(NAME, mask_function)
    config = text_config(model)
    saved = _implementations(model.config)
    hooks = [layer.module.register_forward_pre_hook(_refuse_other_attention) for layer in layers]

    def detach() -> None:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.module.__dict__.pop(STATE, None)
        for part, implementation in saved:
            part._attn_implementation = implementation

    for layer, state in states.items():
        setattr(layer.module, STATE, state)
    _switch(model, config)
    if config._attn_implementation != NAME:
        detach()
        raise UserError(f"{type(model).__name__} does not let its attention implementation be changed (transformers refused)")
    return detach


@contextmanager
def observing(model: PreTrainedModel, make: Callable[[AttentionLayer], LayerState]) -> Iterator[None]:
    """`attach`, without gradients and dropout. Afterwards the model is as it was, every module in its mode."""
    detach = attach(model, make)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        detach()
        for module in training:
            module.training = True


def _refuse_other_attention(module: nn.Module, args: Any) -> None:
    """Before every call of a layer: with another implementation the layer would run without its state, and nobody would know."""
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation != NAME:
        raise UserError(
            f'the attention implementation was set to "{implementation}" while attnsieve is active on this model, which would '
            "then run dense: leave the with block or call remove() on the handle first (set_attn_implementation on another model "
            "of the same configuration object changes this one too)"
        )


def _switch(model: PreTrainedModel, config: Any) -> None:
    """Select the interface for the language model alone; vision and audio towers keep theirs."""
    parts = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
    implementation: str | dict[str, str] = {parts[0]: NAME} if parts else NAME
    model.set_attn_implementation(implementation)


def _implementations(config: Any) -> list[tuple[Any, Any]]:
    """Every configuration inside `config` with its implementation, outer ones first: setting an outer one sets the inner."""
    found = [(config, config._attn_implementation)]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found += _implementations(part)
    return found
