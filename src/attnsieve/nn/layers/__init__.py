"""The attention layers of the model, one file each; all live in the same frame, so only the attention differs."""

from collections.abc import Callable

from torch import nn

from attnsieve.nn.configuration import DmaConfig
from attnsieve.nn.layers.base import Pass
from attnsieve.nn.layers.dense import DenseAttention
from attnsieve.nn.layers.dma import DmaAttention
from attnsieve.nn.layers.mla import LatentAttention
from attnsieve.nn.layers.nsa import NativeSparseAttention
from attnsieve.nn.layers.swa import SlidingWindowAttention

LAYERS: dict[str, Callable[[DmaConfig, int], nn.Module]] = {
    "dma": DmaAttention,
    "mha": DenseAttention,
    "mqa": DenseAttention,
    "gqa": DenseAttention,
    "swa": SlidingWindowAttention,
    "mla": LatentAttention,
    "nsa": NativeSparseAttention,
}

__all__ = ["LAYERS", "DmaAttention", "Pass"]
