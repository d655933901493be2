"""torch.compile without graph breaks: the selection, the module, and whole models forward and backward."""

from __future__ import annotations

import pytest
import torch

from attnsieve.nn import DynamicMaskAttention
from attnsieve.nn.scores import key_scores
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule
from tests.nn_tiny import distinct_tokens, dma
from tests.test_nn_layers import OPTIONS


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_scores_segments_and_selection():
    rule, mask = SelectionRule(5, window=3, sinks=1), torch.tensor([[0] * 3 + [1] * 37, [1] * 40])

    def ends(v, weight, a):
        segments = Segments.of_inputs(mask, None)
        delta, sigma = key_scores(v, weight, None, a)
        return delta, rule.ends(sigma, segments)

    inputs = torch.randn(2, 2, 40, 8), torch.randn(2, 16), torch.tensor([0.3, -0.2])
    compiled = torch.compile(ends, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*inputs), ends(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_the_module():
    layer = DynamicMaskAttention(2, 8, 5, window=3, initial_A=0.3)
    inputs = [torch.randn(2, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2)]
    results = []
    for run in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        out = run(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *layer.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("attention", ["dma", "swa"])
def test_a_model_with_padding_forward_and_backward(attention):
    model, ids = dma(attention=attention, num_hidden_layers=1, **OPTIONS[attention]).train(), distinct_tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    results = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        loss = run(input_ids=ids, attention_mask=mask, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
