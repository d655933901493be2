"""DMA on a GPU: the selection equals the CPU's, nothing waits for the device, gradients and decoding are right."""

import pytest
import torch

from attnsieve import Spans
from attnsieve.nn import BoundedCache, DynamicMaskAttention, RecallTask, SelectionRule, dynamic_mask_attention
from attnsieve.nn.scores import key_scores
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import competition_ends
from attnsieve.nn.selection_oracle import heap_ends
from tests.nn_tiny import distinct_tokens, dma

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising", "falling"])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 300, 4096, 4097, 9001, 70001])
def test_ends_equal_those_of_the_heap(n, kind):
    rising = torch.arange(n).float()
    values = {"ties": torch.tensor([-torch.inf, -1, -0.0, 0.0, 1, torch.inf]), "equal": torch.zeros(1)}
    sigma = {"random": torch.randn(n), "rising": rising, "falling": -rising}.get(kind)
    sigma = values[kind][torch.randint(len(values[kind]), (n,))] if sigma is None else sigma
    for budget in {1, 7, min(1024, n), n // 2 + 1}:
        assert torch.equal(competition_ends(sigma.cuda()[None, None], budget)[0, 0].cpu(), heap_ends(sigma, budget))


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising"])
@pytest.mark.parametrize(("n", "budget"), [(1, 1), (100, 7), (3000, 256), (20001, 1024), (513, 600)])
def test_ends_equal_those_of_the_cpu(n, budget, kind):
    sigma = {
        "random": torch.randn(2, 3, n),
        "ties": torch.randint(-2, 3, (2, 3, n)).float(),
        "equal": torch.zeros(2, 3, n),
        "rising": torch.arange(n).float().expand(2, 3, n).contiguous(),
    }[kind]
    spans = Spans.of(
        [(0, 0, n // 3, 0, n // 3), (0, n // 2, n - n // 2, n // 2, n - n // 2), (1, n // 5, n // 2, n // 5, n // 2)]
    )
    rule = SelectionRule(budget, window=5, sinks=2)
    for segments in (None, Segments.of_spans(spans, 2, n)):
        moved = segments and Segments(segments.start.cuda(), segments.stop.cuda())
        assert torch.equal(rule.ends(sigma.cuda(), moved).cpu(), rule.ends(sigma, segments))


def inputs(n, dtype=torch.bfloat16, width=64):
    make = lambda heads: torch.randn(1, heads, n, width, device="cuda", dtype=dtype, requires_grad=True)  # noqa: E731
    weight = torch.randn(2, 2 * width, device="cuda", requires_grad=True)
    return make(8), make(2), make(2), weight, torch.tensor([0.1, -0.2], device="cuda", requires_grad=True)


def test_forward_and_backward_never_wait_for_the_device():
    q, k, v, weight, a = inputs(2000)
    call = lambda: dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, keep_window_size=256, window=16)  # noqa: E731
    call().float().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outputs_and_gradients_equal_float64(backend, dtype):
    tensors = inputs(1500, dtype)
    names = ("q", "k", "v", "dt_weight", "A")
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    results = []
    for values, chosen in ((tensors, backend), (exact, "reference")):
        arguments = dict(zip(names, values, strict=True))
        out = dynamic_mask_attention(**arguments, keep_window_size=128, backend=chosen)
        probe = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        results.append([out, *torch.autograd.grad((out * probe).sum(), values)])
    for name, actual, expected in zip(("out", *names), *results, strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        # The gradient of A is a small difference of large sums: the rounding of bfloat16 outputs reaches it magnified.
        allowed = 0.02 if name != "A" else {torch.bfloat16: 1.0, torch.float32: 0.05}[dtype]
        assert error < allowed, f"{name}: {error}"


def test_a_training_step_replays_as_one_graph():
    """Nothing in selection, attention or their gradients waits for the host or makes new shapes."""
    model = dma(head_dim=16, window=4, qk_norm=True).cuda().train()
    ids = distinct_tokens(2, 200).cuda()

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    expected = step()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


def test_the_module_compiles_whole():
    layer = DynamicMaskAttention(2, 64, 128, window=16, initial_A=0.1).cuda()
    tensors = [tensor.detach().requires_grad_() for tensor in inputs(500)[:3]]
    results = []
    for run in (torch.compile(layer, fullgraph=True), layer):
        out = run(*tensors)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [*tensors, *layer.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 0.02 * expected.norm()


def test_tokens_taken_back_leave_no_trace():
    q, k, v, weight, a = (tensor.detach() for tensor in inputs(300, torch.float32))
    rule = SelectionRule(32, window=8, sinks=2)
    whole = dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, keep_window_size=32, window=8, sinks=2)
    cache = BoundedCache(rule)
    for first, last, back in [
        (0, 200, 0),
        (200, 220, 13),
        *((t, t + 1, 0) for t in range(207, 230)),
        (230, 231, 9),
        (222, 300, 0),
    ]:
        delta, sigma = key_scores(v[:, :, first:last], weight, None, a)
        out = cache.attend(*(tensor[:, :, first:last] for tensor in (q, k, v)), delta, sigma)
        torch.testing.assert_close(out, whole[:, :, first:last], atol=2e-2, rtol=2e-2)
        if back:
            cache.take_back(back)
        elif not cache.recording:
            cache.record()


def test_recall_rows_are_drawn_on_the_device():
    random = torch.Generator("cuda").manual_seed(0)
    ids, labels = RecallTask(256, 64).sample(30, random, levels=3)
    assert ids.is_cuda
    assert (labels != -100).sum(1).tolist() == [64, 32, 16] * 10
    for row, asked in zip(ids.cpu()[::3], labels.cpu()[::3], strict=True):
        memory = dict(zip(row[:128:2].tolist(), row[1:128:2].tolist(), strict=True))
        assert {int(row[t - 1]): int(asked[t]) for t in (asked != -100).nonzero().flatten()} == memory


def test_decoding_equals_the_whole_text():
    q, k, v, weight, a = (tensor.detach() for tensor in inputs(300, torch.float32))
    rule = SelectionRule(32, window=8, sinks=2)
    whole = dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, keep_window_size=32, window=8, sinks=2)
    cache, parts = BoundedCache(rule), []
    for first, last in [(0, 150), *((t, t + 1) for t in range(150, 300))]:
        delta, sigma = key_scores(v[:, :, first:last], weight, None, a)
        parts.append(cache.attend(*(tensor[:, :, first:last] for tensor in (q, k, v)), delta, sigma))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=2e-2, rtol=2e-2)


def test_an_unchecked_nan_reaches_every_later_output_of_its_head():
    q, k, v, weight, a = (tensor.detach() for tensor in inputs(200))
    v[0, 0, 50] = torch.nan
    out = dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, keep_window_size=16)
    assert bool(out[:, :, 50:].isnan().any(-1).all())


def test_selection_of_long_rows_equals_plain_torch():
    sigma = torch.randn(1, 8, 131072, device="cuda")
    ends = competition_ends(sigma, 1024)
    index = torch.arange(131072, device="cuda")
    assert bool(((ends - index).sum(-1) == (index + 1).clamp_max(1024).sum()).all())
    assert bool(((ends == 131072).sum(-1) == 1024).all())


def test_scores_of_bfloat16_values_are_as_exact_as_float32_ones():
    values, weight = torch.randn(2, 3, 500, 64, device="cuda", dtype=torch.bfloat16), torch.randn(3, 192, device="cuda")
    a, results = torch.full((3,), 0.05, device="cuda"), []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        v, w = (
            values.to(dtype).requires_grad_(),
            weight.to(max(dtype, torch.float32, key=lambda d: d.itemsize)).requires_grad_(),
        )
        delta, sigma = key_scores(v, w, None, a)
        results.append([sigma, *torch.autograd.grad((delta * delta.detach().cos()).sum(), (v, w))])
    for fast, plain, exact, floor in zip(*results, (1e-6, 2**-8, 1e-5), strict=True):
        error = lambda x, exact=exact: (x.double() - exact.double()).norm() / exact.double().norm()  # noqa: E731
        assert error(fast) < 2 * error(plain) + floor
