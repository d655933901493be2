"""Dynamic mask attention against the definition written densely in float64, with autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnsieve import Spans, UserError
from attnsieve.nn.functional import dynamic_mask_attention
from attnsieve.nn.scores import key_scores
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection_oracle import brute_force_mask
from tests.nn_tiny import dma

BACKENDS = ("reference", "portable")
NAMES = ("q", "k", "v", "dt_weight", "dt_bias", "A")


def make(n=37, batch=2, heads=4, kv_heads=2, width=8, value_width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    a = torch.tensor([0.7, -0.4, 0.2, -0.9], dtype=torch.float64)[:kv_heads].to(dtype).requires_grad_()
    return {
        "q": normal(batch, heads, n, width),
        "k": normal(batch, kv_heads, n, width),
        "v": normal(batch, kv_heads, n, value_width),
        "dt_weight": normal(kv_heads, kv_heads * value_width),
        "dt_bias": normal(kv_heads),
        "A": a,
    }


def oracle(q, k, v, dt_weight, dt_bias, A, budget, exponential=True):
    """The equations, head by head and row by row."""
    batch, heads, n, width = q.shape
    group = heads // k.shape[1]
    flat = torch.cat([v[:, h] for h in range(k.shape[1])], dim=-1)
    out = []
    for b in range(batch):
        for a in range(heads):
            h = a // group
            dt = flat[b] @ dt_weight[h] + dt_bias[h]
            delta = A[h] * F.softplus(dt)
            delta = torch.exp(delta) if exponential else delta
            mask = brute_force_mask((A[h].sign() * dt).detach(), budget)
            scores = q[b, a] @ k[b, h].T / width**0.5 + delta[None, :]
            out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[b, h])
    return torch.stack(out).view(batch, heads, n, -1)


def gradients(function, inputs):
    out = function(**inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, dict(zip(inputs, torch.autograd.grad((out * probe).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("budget", "shape"),
    [
        (5, {}),
        (1, {"n": 19}),
        (40, {}),
        (9, {"heads": 6, "kv_heads": 1}),
        (13, {"n": 130, "batch": 1, "heads": 4, "kv_heads": 4}),
    ],
)
def test_equals_the_dense_oracle_with_gradients(backend, budget, shape):
    inputs = make(**shape)
    expected, grads = gradients(lambda **x: oracle(**x, budget=budget), inputs)
    out, ours = gradients(lambda **x: dynamic_mask_attention(**x, keep_window_size=budget, backend=backend), inputs)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    for name in NAMES:
        torch.testing.assert_close(
            ours[name], grads[name], atol=1e-10, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = make(n=7, batch=1, heads=2, kv_heads=2, width=2, value_width=2)
    function = lambda *x: dynamic_mask_attention(  # noqa: E731
        **dict(zip(NAMES, x, strict=True)), keep_window_size=3, window=1, backend=backend
    )
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vector_with_values_bias_and_gradient(backend):
    sigma = [4, 7, 2, 7, 5, 5, 9, 1, 5, 7, 3, 8]
    v = torch.stack([torch.arange(12.0), torch.tensor(sigma) / 10], dim=-1)[None, None].double().requires_grad_()
    zeros = torch.zeros(1, 1, 12, 4, dtype=torch.float64)
    a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    out = dynamic_mask_attention(zeros, zeros, v, dt_weight=weight, A=a, keep_window_size=3, backend=backend)[0, 0, :, 0]
    expected = [0, 0.539285, 0.972671, 1.401391, 2.619335, 2.929002, *[3.445720] * 3, 6, 6, 8.601602]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    (da,) = torch.autograd.grad(out.sum(), a)
    assert float(da) == pytest.approx(0.768958, abs=1e-6)


def bias_gradient(v, dt_weight, A, budget, backend):
    """d loss / d delta, through a delta that is cut out as a leaf."""
    from attnsieve import Layout, attend
    from attnsieve.nn.selection import competition_ends

    delta, sigma = key_scores(v, dt_weight, None, A)
    delta = delta.detach().requires_grad_()
    zeros = v.new_zeros(*v.shape[:3], 4)
    out = attend(zeros, zeros, v, Layout(v.shape[2], competition_ends(sigma, budget)), key_bias=delta, backend=backend)
    return torch.autograd.grad(out[..., 0].sum(), delta)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vector_of_the_bias_gradient(backend):
    sigma = torch.tensor([4, 7, 2, 7, 5, 5, 9, 1, 5, 7, 3, 8])
    v = torch.stack([torch.arange(12.0), sigma / 10], dim=-1)[None, None].double()
    a, weight = torch.tensor([0.5], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    grad = bias_gradient(v, weight, a, 3, backend)[0, 0]
    expected = [-0.983067, -3.449216, 0.304803, -1.626677, 0.427547, 0.641321, 1.847477, 0, 0, 2.040451, 0, 0.797362]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert abs(float(grad.sum())) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": None}, r"v must be a tensor \[batch, KV heads, tokens, width\], got NoneType"),
        ({"dt_weight": None}, r"dt_weight must have shape .*, got NoneType"),
        ({"dt_bias": 1.0}, r"dt_bias must have shape \(2,\) .*, got float"),
    ],
)
def test_scores_are_made_of_tensors(changes, message):
    given = make() | changes
    with pytest.raises(UserError, match=message):
        key_scores(given["v"], given["dt_weight"], given["dt_bias"], given["A"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_never_admitted_gets_no_gradient(backend):
    inputs = make(n=40)
    inputs["A"] = (inputs["A"].detach() * 0.2).requires_grad_()  # a stronger bias saturates the softmax
    _, sigma = key_scores(inputs["v"], inputs["dt_weight"], inputs["dt_bias"], inputs["A"])
    _, grads = gradients(lambda **x: dynamic_mask_attention(**x, keep_window_size=4, backend=backend), inputs)
    never = torch.stack([torch.stack([~brute_force_mask(line, 4).any(0) for line in heads]) for heads in sigma])
    assert never.any()
    assert not never.all()
    assert bool((grads["k"][never] == 0).all())
    never[..., 0] = True  # alone in row 0, where its weight is 1 whatever its score
    assert bool((grads["k"][~never].abs().sum(-1) > 0).all())


def test_at_zero_a_the_weight_gets_no_gradient_but_a_does():
    inputs = make()
    inputs["A"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    _, grads = gradients(lambda **x: dynamic_mask_attention(**x, keep_window_size=6), inputs)
    assert float(grads["dt_weight"].abs().max()) == 0
    assert float(grads["A"].abs().min()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_equal_repeated_keys_and_values(backend):
    inputs = {name: tensor.detach() for name, tensor in make().items()}
    out = dynamic_mask_attention(**inputs, keep_window_size=7, backend=backend)
    per_head = []
    for head in range(4):
        q = inputs["q"][:, head : head + 1].expand(-1, 2, -1, -1)
        per_head.append(dynamic_mask_attention(**{**inputs, "q": q}, keep_window_size=7, backend="reference")[:, head // 2])
    torch.testing.assert_close(out, torch.stack(per_head, dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_queries_are_the_last_rows(backend):
    inputs = {name: tensor.detach() for name, tensor in make().items()}
    options = {"keep_window_size": 5, "window": 2, "sinks": 1, "backend": backend}
    whole = dynamic_mask_attention(**inputs, **options)
    for rows in (1, 11):
        part = dynamic_mask_attention(**{**inputs, "q": inputs["q"][:, :, -rows:]}, **options)
        torch.testing.assert_close(part, whole[:, :, -rows:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "union": True, "sinks": 2}])
def test_padded_and_packed_rows_equal_each_text_alone(backend, options):
    n = 29
    inputs = make(n=n, batch=2)
    documents = [(0, 6, 23), (1, 0, 11), (1, 13, 16)]
    spans = Spans.of([(b, start, length, start, length) for b, start, length in documents])
    padding = ~Segments.of_spans(spans, 2, n).real
    options = {**options, "keep_window_size": 5, "backend": backend}
    poisoned = {name: inputs[name].detach().clone() for name in "qkv"}
    for tensor in poisoned.values():
        tensor.transpose(1, 2)[padding] = torch.nan
        tensor.requires_grad_()
    together, grads = gradients(lambda **x: dynamic_mask_attention(**x, **options, spans=spans), {**inputs, **poisoned})
    assert not together.transpose(1, 2)[padding].any()
    for grad in grads.values():
        assert bool(torch.isfinite(grad).all())
    for b, start, length in documents:
        alone = {name: inputs[name][b : b + 1, :, start : start + length] for name in "qkv"}
        expected = dynamic_mask_attention(**{**inputs, **alone}, **options)
        torch.testing.assert_close(together[b : b + 1, :, start : start + length], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_sees_the_future(backend):
    inputs = {name: tensor.detach() for name, tensor in make(n=48).items()}
    before = dynamic_mask_attention(**inputs, keep_window_size=6, window=2, backend=backend)
    for t in (1, 20, 47):
        changed = {name: inputs[name].clone() for name in "qkv"}
        for tensor in changed.values():
            tensor[:, :, t:] += 3.0
        after = dynamic_mask_attention(**{**inputs, **changed}, keep_window_size=6, window=2, backend=backend)
        torch.testing.assert_close(after[:, :, :t], before[:, :, :t], rtol=0, atol=1e-13)


def test_the_bias_may_be_the_logarithm_of_the_published_one():
    inputs = make()
    actual = gradients(lambda **tensors: dynamic_mask_attention(**tensors, keep_window_size=5, exponential=False), inputs)
    expected = gradients(lambda **tensors: oracle(**tensors, budget=5, exponential=False), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    config = {"num_hidden_layers": 1, "keep_window_size": 4}
    ids = torch.arange(20)[None]
    published, other = (dma(exponential_bias=exponential, **config)(ids).logits for exponential in (True, False))
    assert not torch.allclose(published[:, 1:], other[:, 1:], atol=1e-3)


def test_scores_stay_in_float32_under_autocast():
    inputs = {name: tensor.detach().float() for name, tensor in make(n=64).items()}
    arguments = inputs["v"], inputs["dt_weight"], inputs["dt_bias"], inputs["A"]
    plain = key_scores(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = key_scores(*arguments)
    for expected, actual in zip(plain, inside, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_as_close_as_its_inputs_allow(backend):
    inputs = {name: tensor.detach() for name, tensor in make(n=96, dtype=torch.bfloat16).items()}
    exact = dynamic_mask_attention(**{name: tensor.double() for name, tensor in inputs.items()}, keep_window_size=12)
    out = dynamic_mask_attention(**inputs, keep_window_size=12, backend=backend)
    assert out.dtype == torch.bfloat16
    assert float((out.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(torch.bfloat16).eps


def test_bad_arguments_are_refused():
    inputs = {name: tensor.detach() for name, tensor in make().items()}
    for name, match in (("dt_weight", "dt_weight"), ("A", "A must"), ("dt_bias", "dt_bias")):
        with pytest.raises(UserError, match=match):
            dynamic_mask_attention(**{**inputs, name: inputs[name][:1]}, keep_window_size=4)
    with pytest.raises(UserError, match="NaN"):
        dynamic_mask_attention(**{**inputs, "v": inputs["v"] * torch.nan}, keep_window_size=4)
    for bad in ({"v": 1e6 * inputs["v"].abs()}, {"A": inputs["A"] * torch.nan}):
        with pytest.raises(UserError, match="bias of a key is infinite"):
            dynamic_mask_attention(**{**inputs, "A": inputs["A"].abs() + 1, **bad}, keep_window_size=4)
    shifted = Spans.of([(0, 0, 5, 10, 5)])
    with pytest.raises(UserError, match="last"):
        dynamic_mask_attention(**inputs, keep_window_size=4, spans=shifted)
