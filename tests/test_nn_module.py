"""The module on q, k, v: its parameters, its cache, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from attnsieve import Spans, UserError
from attnsieve.nn import BoundedCache, DynamicMaskAttention, SelectionRule, dynamic_mask_attention


def inputs(n=30, batch=2, kv_heads=2, heads=4, width=6):
    torch.manual_seed(1)
    return torch.randn(batch, heads, n, width), *(torch.randn(batch, kv_heads, n, width) for _ in "kv")


def module(**options):
    torch.manual_seed(2)
    layer = DynamicMaskAttention(2, 6, 5, window=2, bias=True, initial_A=0.5, **options)
    torch.nn.init.normal_(layer.dt_proj.weight)
    return layer


def test_parameters_are_those_of_doge():
    layer = DynamicMaskAttention(2, 6, 5)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"A": (2,), "dt_proj.weight": (2, 12)}
    assert not layer.A.any()


def test_it_is_the_function_of_its_parameters():
    layer = module()
    expected = dynamic_mask_attention(
        *inputs(), dt_weight=layer.dt_proj.weight, dt_bias=layer.dt_proj.bias, A=layer.A, keep_window_size=5, window=2
    )
    assert torch.equal(layer(*inputs()), expected)


def test_cached_steps_equal_the_whole_text_also_padded():
    layer, (q, k, v) = module(), inputs()
    spans = Spans.left_padded(torch.tensor([0, 4]), 30, 30)
    whole = layer(q, k, v, spans=spans)
    cache = layer.cache()
    prompt = Spans.left_padded(torch.tensor([0, 4]), 10, 10)
    parts = [layer(q[:, :, :10], k[:, :, :10], v[:, :, :10], spans=prompt, cache=cache)]
    for t in range(10, 30):
        parts.append(layer(*(tensor[:, :, t : t + 1] for tensor in (q, k, v)), cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def test_every_parameter_learns():
    layer = module()
    layer(*inputs()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_gradient_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    plain, layer = module(), module()
    q, k, v = (tensor.requires_grad_() for tensor in inputs())
    plain(q, k, v).square().sum().backward()
    expected, q.grad = q.grad, None
    checkpoint(layer, q, k, v, use_reentrant=False).square().sum().backward()
    assert torch.equal(q.grad, expected)
    assert torch.equal(layer.A.grad, plain.A.grad)


def test_a_cache_of_another_rule_or_packed_documents_are_refused():
    layer, (q, k, v) = module(), inputs(batch=1)
    with pytest.raises(UserError, match="was made for"):
        layer(q, k, v, cache=BoundedCache(SelectionRule(6, 2)))
    with pytest.raises(UserError, match="packed"):
        layer(q, k, v, spans=Spans.packed([10, 20]), cache=layer.cache())
