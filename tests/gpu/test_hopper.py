"""The kernels for Hopper GPUs: prefill against the float64 oracle, gradients against the Triton kernel, which is checked against it."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, attend
from attnsieve.bench.masks import selected
from attnsieve.layout import Layout
from attnsieve.testing import assert_within_budget, relative_error
from tests.gpu.test_triton import call_of, poison

hopper = pytest.importorskip("attnsieve.backends.triton.hopper", exc_type=ImportError)
forward = pytest.importorskip("attnsieve.backends.triton.forward", exc_type=ImportError)
gradients = pytest.importorskip("attnsieve.backends.triton.gradients", exc_type=ImportError)
tuning = pytest.importorskip("attnsieve.backends.triton.tuning", exc_type=ImportError)
Tiles = pytest.importorskip("attnsieve.backends.triton.geometry", exc_type=ImportError).Tiles
row_columns = pytest.importorskip("attnsieve.backends.triton.product_columns", exc_type=ImportError).row_columns
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.fixture
def served(monkeypatch):
    """What `hopper.serves` answers."""
    answers, serves = [], hopper.serves
    monkeypatch.setattr(hopper, "serves", lambda *arguments: answers.append(serves(*arguments)) or answers[-1])
    return answers


def run(call):
    poison()
    return forward.forward(call, tuning.forward_tiles(call))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
def test_prefill(group, dtype, bias, served):
    call = call_of(selected(1100, 2, "cuda", 200), group=group, kv_heads=2, n=1100, width=128, dtype=dtype)
    call = call if bias else replace(call, key_bias=None)
    assert_within_budget(*run(call), call)
    assert served == [True]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 517, 2100])
def test_lengths(n, served):
    call = call_of(selected(n, 3, "cuda", 70), group=4, kv_heads=3, n=n, batch=2, width=128)
    assert_within_budget(*run(call), call)
    assert served == [True]


def test_a_mask_for_each_query_head(served):
    call = call_of(selected(700, 8, "cuda", 90), group=4, kv_heads=2, n=700, width=128)
    assert_within_budget(*run(call), call)
    assert served == [True]


@pytest.mark.parametrize("q_len", [40, 300, 1100])
@pytest.mark.parametrize("pads", [None, (0, 401), (1100, 7)], ids=["whole", "padded", "empty"])
def test_chunks_and_padding_that_holds_nan(q_len, pads, served):
    spans = None if pads is None else Spans.left_padded(torch.tensor(pads, device="cuda"), q_len, 1100)
    call = call_of(selected(1100, 2, "cuda", 200), batch=2, group=4, kv_heads=2, q_len=q_len, n=1100, width=128, spans=spans)
    for b, pad in enumerate(pads or ()):
        call.k[b, :, :pad] = torch.nan
        call.v[b, :, :pad] = torch.nan
        call.q[b, :, : max(0, pad - 1100 + q_len)] = torch.nan
    assert_within_budget(*run(call), call)
    assert served == [True]


def test_packed_documents(served):
    spans = Spans.packed([300, 1, 517, 70], device="cuda")
    call = call_of(selected(900, 2, "cuda", 100), group=4, kv_heads=2, n=900, width=128, spans=spans)
    assert_within_budget(*run(call), call)
    assert served == [True]


def test_rows_that_keep_nothing(served):
    """No key is kept by its own row: the first tiles list none, and later rows may lose all."""
    n = 600
    position = torch.arange(n, device="cuda")
    end = torch.where((position % 3 == 1) & (position > 200), position + 1 + position % 50, 0).int().expand(1, 2, n)
    call = call_of(Layout(n, end.contiguous(), most_keys=50), group=4, kv_heads=2, n=n, width=128)
    out, lse = run(call)
    assert bool((lse == -torch.inf).any())
    assert_within_budget(out, lse, call)
    assert served == [True]


@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("q", torch.nan)])
def test_what_is_not_finite_reaches_only_rows_that_keep_its_key(where, value, served):
    n, j = 1100, 140
    call = call_of(selected(n, 2, "cuda", 100), group=4, kv_heads=2, n=n, width=128)
    clean, _ = run(call)
    {"q": call.q, "k": call.k, "v": call.v}[where][:, :, j, 3] = value
    out, lse = run(call)
    rows = torch.arange(n, device="cuda")
    keeps = call.layout.dense(rows, torch.tensor([j], device="cuda"))[..., 0].repeat_interleave(4, 1)
    keeps = (rows == j).expand_as(keeps) if where == "q" else keeps
    assert 0 < int(keeps.sum()) < keeps.numel()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    assert torch.equal(lse.isnan(), keeps & (where != "v"))
    assert relative_error(out[~keeps], clean[~keeps].double()) < 2 * torch.finfo(out.dtype).eps
    assert served == [True, True]


def test_rows_at_odd_addresses_are_copied_first():
    """A call that was prepared for others is repeated."""
    call = call_of(selected(600, 2, "cuda", 100), group=4, kv_heads=2, n=600, width=128)
    call = replace(call, key_bias=None)
    prefill = forward.Prefill(call, tuning.forward_tiles(call))
    from attnsieve.backends.triton.common import places_of

    expected = prefill(call.q, call.k, call.v, None, places_of(call.spans))
    odd = torch.cat([call.k, call.k], -1)[..., 1:129].copy_(call.k)
    for _ in range(3):
        found = prefill(call.q, odd, call.v, None, places_of(call.spans))
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, run(replace(call, k=odd)), expected))


def test_a_graph_repeats_it():
    call = call_of(selected(1500, 2, "cuda", 100), group=4, kv_heads=2, n=1500, width=128)
    run(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(call.q, call.k, call.v, call.layout, key_bias=call.key_bias, backend="triton", return_lse=True)
    for _ in range(2):
        out.fill_(torch.nan)
        call.q.normal_()
        graph.replay()
        assert_within_budget(out, lse, call)


@pytest.mark.parametrize("q_len", [300, 1100])
@pytest.mark.parametrize("pads", [None, (0, 401)], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_keys_are_those_of_triton(q_len, pads, bias, served):
    """Chunks of queries, and left padding that holds NaN."""
    n = 1100
    spans = None if pads is None else Spans.left_padded(torch.tensor(pads, device="cuda"), q_len, n)
    call = call_of(selected(n, 2, "cuda", 200), batch=2, group=4, kv_heads=2, q_len=q_len, n=n, width=128, spans=spans)
    call = call if bias else replace(call, key_bias=None)
    d_out = torch.randn_like(call.q)
    if pads is not None:
        call.k[1, :, : pads[1]] = torch.nan
        call.v[1, :, : pads[1]] = torch.nan
        d_out[1, :, : max(0, pads[1] - n + q_len)] = torch.nan
    out, lse = forward.forward(call, Tiles(64, 64, 4, 2))
    columns = row_columns(call, lse, gradients.row_sums(call, out, lse, d_out, None).nan_to_num())
    found = gradients.key_gradients(call, d_out, columns)
    assert served == [True]
    for ours, triton in zip(found, gradients.key_gradients(call, d_out, columns, Tiles(64, 64, 4, 2)), strict=True):
        # Both round their sums to half precision; the bias' are float32.
        assert (ours is None) == (triton is None)
        assert ours is None or relative_error(ours, triton) < 2 * torch.finfo(ours.dtype).eps


@pytest.mark.parametrize("log_bias", [18, 22, 23, 40, 80])
def test_a_bias_that_leaves_no_room_for_scores(log_bias, served):
    """DMA's bias is an exponential. Where float32 cannot hold scores less their LSE, weights still are weights."""
    call = call_of(selected(900, 2, "cuda", 200), group=4, kv_heads=2, n=900, width=128)
    spread = torch.rand_like(call.key_bias) * 0.05
    tensors = [x.requires_grad_() for x in (call.q, call.k, call.v, (log_bias - spread).exp())]
    q, k, v, bias = tensors
    out, lse = attend(q, k, v, call.layout, spans=call.spans, key_bias=bias, backend="triton", return_lse=True)
    gradients = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert served[0]
    assert bool(lse.isfinite().all())
    assert bool((out.abs().amax((0, 2)) <= v.abs().amax((0, 2)).repeat_interleave(4, 0) * 1.02).all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
