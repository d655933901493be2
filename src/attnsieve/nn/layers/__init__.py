"""The attention layers of the model, one file each; all live in the same frame, so only the attention differs."""

from collections.abc import Callable

from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.layers.base import Pass, ProjectedAttention
from attnsieve.nn.layers.dense import DenseAttention
from attnsieve.nn.layers.dma import DmaAttention
from attnsieve.nn.layers.swa import SlidingWindowAttention

LAYERS: dict[str, Callable[[DmaConfig, int], ProjectedAttention]] = {
    "dma": DmaAttention,
    "mha": DenseAttention,
    "mqa": DenseAttention,
    "gqa": DenseAttention,
    "swa": SlidingWindowAttention,
}

__all__ = ["LAYERS", "DmaAttention", "Pass", "ProjectedAttention"]
