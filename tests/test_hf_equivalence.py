"""Under a plan a model computes exactly what eager attention computes with the plan's masks written out."""

import pytest
import torch

from attnsieve.hf import apply, fingerprint
from attnsieve.plan import Plan
from tests.hf_tiny import BACKENDS, FAMILIES, close, logits, masked_model, mixed_plan, oracle, tiny, tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["dense()", "window(100000)"])
def test_a_plan_that_keeps_everything_is_the_model(family, rule):
    model = tiny(family)
    ids = tokens(2, 40)
    expected = logits(model, ids)
    with apply(model, Plan.uniform(fingerprint(model), rule), backend="reference") as handle:
        close(logits(model, ids), expected)
    assert (handle.report().sparse_calls > 0) == (rule != "dense()")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_family_equals_eager_with_written_masks(family, backend):
    model = tiny(family)
    plan = mixed_plan(model)
    for n in (1, 15, 37):
        ids = tokens(2, n)
        expected = oracle(model, plan, ids)
        with apply(model, plan, backend=backend) as handle:
            close(logits(model, ids, use_cache=False), expected)
        assert handle.report().sparse_calls > 0
    model.set_attn_implementation("eager")
    assert (logits(model, ids) - expected).abs().max() > 1e-2, "the plan changes nothing, so this test proves nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = tiny("qwen3", dtype)
    plan = mixed_plan(model)
    ids = tokens(1, 33)
    fine = tiny("qwen3", torch.float64)
    exact = oracle(fine, plan, ids, "sdpa")
    dense_error = (logits(model, ids).double() - logits(fine, ids)).norm()
    with apply(model, plan, backend="reference"):
        sparse = logits(model, ids)
    assert sparse.dtype == dtype
    floor = 1e-12 * exact.norm()
    assert (sparse.double() - exact).norm() <= 2 * dense_error + floor


@pytest.mark.parametrize("use_cache", [True, False], ids=["one dtype", "mixed dtypes"])
def test_autocast_runs_in_its_dtype_as_sdpa_does(use_cache):
    model = tiny("llama")
    ids = tokens(1, 20)
    plan = Plan.uniform(fingerprint(model), "window(100000)")
    exact = logits(model, ids)
    model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        sdpa = logits(model, ids, use_cache=use_cache)
        with apply(model, plan, backend="reference"):
            ours = logits(model, ids, use_cache=use_cache)
    assert ours.dtype == sdpa.dtype
    assert (ours - exact).norm() <= 2 * (sdpa - exact).norm()


def test_gradients_equal_eager_with_written_masks():
    model = tiny("llama", torch.float64).train()
    plan = mixed_plan(model)
    ids = tokens(2, 21)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with masked_model(model, plan, "sdpa"):
        expected = gradients()
    with apply(model, plan, backend="reference") as handle:
        got = gradients()
    assert handle.report().unplanned == {}
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, 1e-9)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny("llama", torch.float64).train()
    plan = mixed_plan(model)
    ids = tokens(1, 12)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with apply(model, plan, backend="reference"):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    close(gradients[0], gradients[1], 1e-12)
