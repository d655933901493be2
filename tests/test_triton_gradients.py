"""Gradients of Triton's kernels, interpreted, and of the portable backend, against the float64 oracle."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, compile_layout
from attnsieve.backends import portable, reference, triton
from attnsieve.backends.call import Call
from attnsieve.bench.check import check_gradients
from attnsieve.bench.masks import selected
from attnsieve.patterns import columns, diagonals, empty, random_blocks, sink, window
from attnsieve.testing import in_float64, relative_error
from tests.interpreter import needs_interpreter
from tests.laws.samples import captured, dam

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
BACKENDS = [portable, pytest.param(triton, marks=needs_interpreter)]
MIXED = [sink(2) | window(9), dam(20, (0, 7), (0, 1, 6)), diagonals(0, 40, 90), empty()]
PATTERNS = [
    columns(0, 5, 64, 65) | window(20),
    diagonals(*range(30), 60),
    random_blocks(2, block=16, seed=3),
    captured(24),
    dam(33, (0,), (32,)) | sink(2),
]


def make(layout, *, group=2, kv_heads=1, n=90, width=24, dtype=torch.bfloat16, spans=None):
    batch = 1 if spans is None else int(spans.batch.max()) + 1
    shapes = ((kv_heads * group, n, width), (kv_heads, n, width), (kv_heads, n, width))
    q, k, v = (torch.randn(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    bias = torch.randn(batch, kv_heads, n, requires_grad=True)
    return Call(q, k, v, layout, Spans.full(1, n, n) if spans is None else spans, width**-0.5, bias)


def leaves(call):
    return [call.q, call.k, call.v, call.key_bias]


def check(call, backend):
    out, _ = backend.run(call)
    d_out = torch.randn_like(out)
    return check_gradients(call, d_out, torch.autograd.grad(out, leaves(call), d_out))


@needs_interpreter
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: str(pattern)[:40])
def test_patterns(pattern):
    check(make(compile_layout([pattern], 100)), triton)


@needs_interpreter
@pytest.mark.parametrize(
    ("width", "group", "dtype"),
    [
        (24, 1, torch.float32),
        (64, 8, torch.bfloat16),
        (80, 4, torch.float16),
        (128, 7, torch.bfloat16),
        (256, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_selected_keys_of_widths_groups_and_types(width, group, dtype):
    check(make(selected(120, 1, "cpu", 30), n=120, width=width, group=group, dtype=dtype), triton)


def loss_gradients(call, run):
    """Of a loss that reads the output and the LSE of every row, -inf where a row keeps nothing."""
    out, lse = run(call)
    return torch.autograd.grad(out.double().sin().sum() + (0.1 * lse.double().clamp_min(-1e6)).square().sum(), leaves(call))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [MIXED, MIXED[:2]], ids=["own", "shared"])
def test_padding_and_gradients_through_the_lse(heads, backend):
    spans = Spans.left_padded(torch.tensor([0, 13]), 60, 60)
    call = make(compile_layout(heads, 60), kv_heads=2, n=60, spans=spans, dtype=torch.float32)
    exact = in_float64(call)
    expected = loss_gradients(exact, reference.run)
    for gradient, wanted in zip(loss_gradients(call, backend.run), expected, strict=True):
        assert relative_error(gradient, wanted) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [lambda n: compile_layout([window(20) | sink(2)], n), lambda n: selected(n, 1, "cpu", n)])
@pytest.mark.parametrize("removed", [-torch.inf, torch.finfo(torch.float32).min])
def test_keys_removed_by_their_bias_have_no_gradient(layout, removed, backend):
    """Rows of a program that are no queries, beyond the sequence or the group, add nothing there."""
    call = make(layout(37), group=3, n=37, dtype=torch.float32)
    with torch.no_grad():
        call.key_bias[..., 3::5] = removed
    gradients = loss_gradients(call, backend.run)
    for gradient, wanted in zip(gradients, loss_gradients(in_float64(call), reference.run), strict=True):
        assert relative_error(gradient, wanted) < 100 * torch.finfo(torch.float32).eps
    assert not gradients[1][..., 3::5, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_equal_for_all_keys_has_no_gradient(backend):
    """Softmax does not see a shift of a row: the gradients of its keys' biases sum to 0. In half precision they missed that by
    more than 1 % while delta was summed from the rounded output."""
    n = 120
    for dtype in (torch.bfloat16, torch.float16):
        call = make(selected(n, 1, "cpu", 30), n=n, dtype=dtype)
        out, lse = backend.run(call)
        (gradient,) = torch.autograd.grad([out, lse], [call.key_bias], [torch.randn_like(out), torch.zeros_like(lse)])
        assert gradient.sum().abs() < n * torch.finfo(torch.float32).eps * gradient.abs().sum()


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "spread"])
@pytest.mark.parametrize("log_bias", [18, 22, 24, 40, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_stay_weights_beside_a_bias_that_leaves_no_room_for_scores(backend, log_bias, equal):
    """DMA's bias is an exponential. From e^18 on float32 cannot hold scores less their LSE; weights beyond 1 made gradients NaN."""
    n = 120
    call = make(selected(n, 1, "cpu", 48), n=n, width=64)
    spread = torch.zeros(1, 1, n) if equal else 0.05 * torch.rand(1, 1, n)
    call = replace(call, key_bias=(log_bias - spread).exp().requires_grad_())
    out, lse = backend.run(call)
    most = call.v.detach().abs().amax().float() * (1 + 2 * torch.finfo(call.v.dtype).eps)
    assert bool(lse.isfinite().all())
    assert bool((out.float().abs() <= most).all())
    d_out = torch.randn_like(out)
    _, _, dv, _ = gradients = torch.autograd.grad(out, [call.q, call.k, call.v, call.key_bias], d_out)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    # No key can get more than all rows give.
    assert float(dv.abs().max()) <= float(d_out.abs().sum(2).max()) * call.q.shape[1] * 1.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_scaled_bias(backend):
    """DMA's A scales values of about one sign: its gradient is a small difference of large sums over the keys."""
    torch.manual_seed(3)
    call = make(selected(200, 1, "cpu", 40), n=200, group=4, width=32)
    factor = 1 + 0.2 * torch.randn_like(call.key_bias)
    out, _ = backend.run(call)
    d_out = torch.randn_like(out)
    exact = in_float64(call)
    wanted = torch.autograd.grad(reference.run(exact)[0], exact.key_bias, d_out.double())[0]
    gradient = torch.autograd.grad(out, call.key_bias, d_out)[0]
    error = ((gradient - wanted) * factor).sum() / (wanted * factor).sum()
    assert error.abs() < 2 * torch.finfo(torch.bfloat16).eps


@needs_interpreter
def test_deterministic_gradients_repeat_bit_for_bit():
    torch.use_deterministic_algorithms(True)
    try:
        call = make(selected(120, 2, "cpu", 30), n=120, kv_heads=2, group=4)
        runs = [loss_gradients(call, triton.run) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    call = Call(q, k, v, compile_layout([window(9)], 20), Spans.full(1, 20, 20), 0.25)
    out, _ = backend.run(call)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient + q).sum().backward()
