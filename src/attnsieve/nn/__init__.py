"""Trainable Dynamic Mask Attention (arXiv 2508.02124): selection, functional form, module and model."""

from importlib import import_module
from typing import Any

from attnsieve.nn.cache import BoundedCache
from attnsieve.nn.functional import dynamic_mask_attention
from attnsieve.nn.module import DynamicMaskAttention
from attnsieve.nn.mqar import RecallTask
from attnsieve.nn.selection import SelectionRule

# These import transformers.
_LAZY = {
    "DmaCache": "attnsieve.nn.generation",
    "DmaConfig": "attnsieve.nn.configuration",
    "DmaForCausalLM": "attnsieve.nn.modeling",
    "DmaModel": "attnsieve.nn.modeling",
    "TrainingSettings": "attnsieve.nn.training",
    "convert": "attnsieve.nn.conversion",
    "train": "attnsieve.nn.training",
}

__all__ = ["BoundedCache", "DynamicMaskAttention", "RecallTask", "SelectionRule", "dynamic_mask_attention", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'attnsieve.nn' has no attribute {name!r}")
