"""Tiny random models of many families, a plan with a different rule per head, and the oracle: eager with 4-D masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import transformers as tr
from torch import Tensor

from attnsieve.hf import fingerprint
from attnsieve.hf.geometry import AttentionLayer, attention_layers
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
MQA = {"num_attention_heads": 4, "num_key_value_heads": 1}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}

FAMILIES = {
    "llama": lambda: tr.LlamaConfig(**SIZES, **GQA),
    "qwen2": lambda: tr.Qwen2Config(**SIZES, **MHA),
    "qwen3": lambda: tr.Qwen3Config(**SIZES, **GQA, head_dim=10),
    "mistral": lambda: tr.MistralConfig(**SIZES, **MQA, head_dim=6),
    "gemma3": lambda: tr.Gemma3TextConfig(**SIZES, **GQA, **HYBRID, head_dim=12),
    "phi3": lambda: tr.Phi3Config(**SIZES, **GQA),
    "smollm3": lambda: tr.SmolLM3Config(**SIZES, **GQA, no_rope_layers=[1, 0]),
}

BACKENDS = [
    "reference",
    pytest.param("portable", marks=pytest.mark.skipif(not find_spec("attnsieve.backends.portable"), reason="not built")),
]


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> tr.PreTrainedModel:
    """A seeded random model in eval mode whose attention is not flat."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return model.to(dtype)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, shape, generator=generator)


def mixed_plan(model: tr.PreTrainedModel) -> Plan:
    """Six rules of every kind, dealt to the heads of both layers in different order; every row keeps its own key."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(9, 9, generator=generator) < 0.4
    corner = (corner | torch.eye(9, dtype=torch.bool)).tril()
    rules = [
        Pattern.parse("sink(2) | window(5)"),
        Pattern.parse("columns(0, 3, 11) | diagonals(0, 2, 7)"),
        Pattern.of(Captured.from_mask(corner)) | Pattern.parse("columns(0, start=9) | diagonals(0, 1, start=9)"),
        Pattern.parse("dilated(6, step=3)"),
        Pattern.parse("dense()"),
        Pattern.parse("random_blocks(1, block=4, seed=3) | window(1)"),
    ]
    mark = fingerprint(model)
    rows = [[rules[(h + 2 * layer) % 6] for h in range(mark.heads)] for layer in range(mark.layers)]
    return Plan(mark, rows)


def head_masks(row: Sequence[Pattern], n: int) -> Tensor:
    """bool [heads, n, n] from the definition of the rules."""
    position = torch.arange(n)
    return torch.stack([pattern.keep(position[:, None], position[None, :]) for pattern in row])


@contextmanager
def masked_model(model: tr.PreTrainedModel, plan: Plan, implementation: str = "eager") -> Iterator[None]:
    """The oracle: stock attention with masks that also close what the plan leaves out, for whole, unpadded texts.

    Eager rounds its softmax to float32 whatever the dtype and averages V in rows without keys; "sdpa" is exact in float64
    and outputs 0 there.
    """

    def close(index: int, window: int | None):
        def hook(module, args, kwargs):
            n = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
            keep = head_masks(plan.row(index), n)
            if window is not None:
                whole = any(atom.blocks(1) is not None for pattern in plan.row(index) for atom in pattern)
                keep = window_mask(n, window) if whole else keep & window_mask(n, window)
            if implementation == "eager":
                dtype = next(module.parameters()).dtype
                keep = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
            return args, kwargs | {"attention_mask": keep[None]}

        return hook

    model.set_attn_implementation(implementation)
    hooks = [
        layer.module.register_forward_pre_hook(close(layer.index, binding_window(layer)), with_kwargs=True)
        for layer in attention_layers(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def binding_window(layer: AttentionLayer) -> int | None:
    """The layer's sliding window where it is shorter than the model's context."""
    window, context = layer.window, layer.context
    return window if window is not None and context is not None and window < context else None


def window_mask(n: int, window: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return ((j <= i) & (i - j < window))[None]


@torch.no_grad()
def logits(model: tr.PreTrainedModel, ids: Tensor, **inputs) -> Tensor:
    return model(input_ids=ids, **inputs).logits


@torch.no_grad()
def oracle(model: tr.PreTrainedModel, plan: Plan, ids: Tensor, implementation: str = "eager") -> Tensor:
    """Logits of the plan on whole, unpadded texts."""
    with masked_model(model, plan, implementation):
        return logits(model, ids, use_cache=False)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
