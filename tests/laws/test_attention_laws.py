"""Laws of `attend`, for every backend that runs on this machine: exact masks, chunks, decode, padding, packing, batches."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends.call import Call
from attnsieve.patterns import columns, dense, diagonals, empty, random_blocks, sink, window
from attnsieve.testing import assert_within_budget, relative_error
from tests.interpreter import needs_interpreter
from tests.laws.samples import SAMPLES, dam, patterns

# Triton's own tests of exactness (tests/test_triton_*.py) are cheaper: it is interpreted here.
IN_FLOAT64 = ["reference", "portable"]
BACKENDS = [*IN_FLOAT64, pytest.param("triton", marks=needs_interpreter)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# The widest type of each backend.
WIDEST = {"reference": torch.float64, "portable": torch.float64, "triton": torch.float32}
MIXED = [sink(2) | window(9), dam(20, (0, 7), (0, 1, 6)), diagonals(0, 40, 90), empty()]
# What sums of some hundred terms of order one may differ by in another order, in roundings of their type.
ROUNDINGS = 100


def equal_but_for_rounding(value, expected):
    return relative_error(value, expected) < ROUNDINGS * torch.finfo(value.dtype).eps


def inputs(batch, heads, kv_heads, q_len, k_len, width=16, v_width=None, dtype=torch.float64):
    q = torch.randn(batch, heads, q_len, width, dtype=dtype)
    k = torch.randn(batch, kv_heads, k_len, width, dtype=dtype)
    v = torch.randn(batch, kv_heads, k_len, v_width or width, dtype=dtype)
    return q, k, v


def check(call, backend):
    out, lse = attend(
        call.q,
        call.k,
        call.v,
        call.layout,
        spans=call.spans,
        scale=call.scale,
        key_bias=call.key_bias,
        backend=backend,
        return_lse=True,
    )
    assert_within_budget(out, lse, call)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle(pattern, dtype, backend):
    q, k, v = inputs(1, 2, 1, 261, 261, width=24, dtype=dtype)
    layout = compile_layout([pattern], 300)
    check(Call(q, k, v, layout, Spans.full(1, 261, 261), 24**-0.5), backend)


@pytest.mark.parametrize("backend", IN_FLOAT64)
@given(data=st.data())
def test_equals_the_oracle_for_any_shape(backend, data):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 4, 7, 8]))
    k_len = data.draw(st.integers(1, 300))
    q_len = data.draw(st.integers(1, k_len))
    batch, width, v_width = (
        data.draw(st.integers(1, 2)),
        data.draw(st.sampled_from([1, 5, 16])),
        data.draw(st.sampled_from([3, 8])),
    )
    heads = kv_heads * group if data.draw(st.booleans()) else kv_heads
    pool = data.draw(st.lists(patterns(), min_size=1, max_size=3))
    layout = compile_layout([pool[h % len(pool)] for h in range(heads)], k_len + data.draw(st.integers(0, 50)))
    q, k, v = inputs(batch, kv_heads * group, kv_heads, q_len, k_len, width, v_width)
    bias = torch.randn(batch, kv_heads, k_len, dtype=q.dtype) if data.draw(st.booleans()) else None
    pads = torch.tensor(data.draw(st.lists(st.integers(0, k_len), min_size=batch, max_size=batch)))
    check(Call(q, k, v, layout, Spans.left_padded(pads, q_len, k_len), 0.7, bias), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_and_chunks_equal_prefill(backend):
    n = 170
    q, k, v = inputs(1, 4, 2, n, n, dtype=WIDEST[backend])
    layout = compile_layout(MIXED, 256)
    whole = attend(q, k, v, layout, backend=backend)
    for cuts in ([0, 1, 64, 129, 170], list(range(167, 171))):
        parts = [attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], layout, backend=backend) for a, b in pairwise(cuts)]
        assert equal_but_for_rounding(torch.cat(parts, dim=2), whole[:, :, cuts[0] :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_only_shifts_positions(backend):
    n, pads = 150, torch.tensor([0, 37, 149, 150])
    q, k, v = inputs(4, 4, 2, n, n, dtype=WIDEST[backend])
    layout = compile_layout(MIXED, n)
    for b, pad in enumerate(pads.tolist()):
        for tensor in (q, k, v):
            tensor[b, :, :pad] = torch.nan
    out, lse = attend(q, k, v, layout, spans=Spans.left_padded(pads, n, n), backend=backend, return_lse=True)
    for b, pad in enumerate(pads.tolist()):
        assert not out[b, :, :pad].any()
        assert lse[b, :, :pad].isneginf().all()
        if pad < n:
            alone = attend(*(tensor[b : b + 1, :, pad:] for tensor in (q, k, v)), layout, backend=backend)
            assert equal_but_for_rounding(out[b : b + 1, :, pad:], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(backend):
    lengths = [1, 140, 33, 7]
    q, k, v = inputs(1, 4, 2, 181, 181, dtype=WIDEST[backend])
    layout = compile_layout(MIXED, 181)
    packed = attend(q, k, v, layout, spans=Spans.packed(lengths), backend=backend)
    start = 0
    for n in lengths:
        alone = attend(*(tensor[:, :, start : start + n] for tensor in (q, k, v)), layout, backend=backend)
        assert equal_but_for_rounding(packed[:, :, start : start + n], alone)
        start += n


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_order_does_not_matter(backend):
    q, k, v = inputs(3, 4, 2, 60, 60, dtype=WIDEST[backend])
    layout = compile_layout(MIXED, 60)
    order = torch.tensor([2, 0, 1])
    out = attend(q, k, v, layout, backend=backend)
    assert equal_but_for_rounding(attend(q[order], k[order], v[order], layout, backend=backend), out[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_after_t_never_change_outputs_up_to_t(backend):
    t, n = 77, 140
    q, k, v = inputs(1, 4, 2, n, n, dtype=WIDEST[backend])
    layout = compile_layout(MIXED, n)
    before = attend(q, k, v, layout, backend=backend)[:, :, : t + 1]
    for tensor in (q, k, v):
        tensor[:, :, t + 1 :] = torch.randn_like(tensor[:, :, t + 1 :])
    assert torch.equal(attend(q, k, v, layout, backend=backend)[:, :, : t + 1], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "where", "value"), [(16, "v", torch.nan), (64, "k", torch.nan), (64, "v", torch.inf)])
def test_what_is_not_finite_reaches_only_rows_that_keep_its_key(block, where, value, backend):
    n, j = 100, 40
    q, k, v = inputs(1, 4, 2, n, n, dtype=WIDEST[backend])
    heads = [window(9) | columns(40, 70), dam(20, (0, 40), (0, 1, 6)), diagonals(0, 30, 50), random_blocks(2, block=block)]
    layout = compile_layout(heads, n)
    clean, clean_lse = attend(q, k, v, layout, backend=backend, return_lse=True)
    (k if where == "k" else v)[:, :, j, 3] = value
    out, lse = attend(q, k, v, layout, backend=backend, return_lse=True)
    keeps = layout.dense(torch.arange(n), torch.tensor([j]))[..., 0]
    assert 0 < keeps[:, :, 80:].sum() < keeps[:, :, 80:].numel()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    assert equal_but_for_rounding(out[~keeps], clean[~keeps])
    assert torch.equal(lse.masked_fill(keeps, 0), clean_lse.masked_fill(keeps, 0))
    assert bool((lse.isnan() if where == "k" else lse == clean_lse)[keeps].all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_removes_its_key(backend):
    n, j = 90, torch.tensor([3, 40, 41])
    q, k, v = inputs(1, 4, 2, n, n, dtype=WIDEST[backend])
    bias = torch.randn(1, 2, n, dtype=q.dtype)
    bias[..., j] = -torch.inf
    layout = compile_layout(MIXED, n)
    out, lse = attend(q, k, v, layout, key_bias=bias, backend=backend, return_lse=True)
    assert_within_budget(out, lse, Call(q, k, v, layout, Spans.full(1, n, n), 0.25, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_give_zero_and_minus_infinity(backend):
    q, k, v = inputs(1, 2, 1, 20, 20, dtype=WIDEST[backend])
    out, lse = attend(q, k, v, compile_layout([empty()], 20), backend=backend, return_lse=True)
    assert not out.any()
    assert lse.isneginf().all()
    out, lse = attend(q, k, v, compile_layout([diagonals(5)], 20), backend=backend, return_lse=True)
    assert not out[:, :, :5].any()
    assert lse[:, :, :5].isneginf().all()
    assert lse[:, :, 5:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_equal_repeated_keys(backend):
    q, k, v = inputs(2, 6, 2, 90, 90, dtype=WIDEST[backend])
    layout = compile_layout([window(5), dense(), columns(1, 60)] * 2, 90)
    repeated = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), layout, backend=backend)
    assert equal_but_for_rounding(attend(q, k, v, layout, backend=backend), repeated)


@pytest.mark.parametrize("per_group", [False, True])
def test_gradients_equal_the_oracle(per_group):
    n = 150
    q, k, v = inputs(2, 4, 2, n, n, width=6, v_width=5)
    bias = torch.randn(2, 2, n, dtype=q.dtype)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, bias)]
    layout = compile_layout([diagonals(0, 30, 77) | sink(1), window(6)] if per_group else MIXED, n)
    spans = Spans.left_padded(torch.tensor([0, 45]), n, n)
    found = []
    for backend in IN_FLOAT64:
        out, lse = attend(q, k, v, layout, spans=spans, key_bias=bias, backend=backend, return_lse=True)
        loss = out.sin().sum() + lse[lse.isfinite()].cos().sum()
        found.append(torch.autograd.grad(loss, tensors))
    for exact, gradient in zip(*found, strict=True):
        assert equal_but_for_rounding(gradient, exact)


def test_gradcheck():
    q, k, v = inputs(1, 2, 1, 9, 12, width=3)
    bias = torch.randn(1, 1, 12, dtype=q.dtype)
    layout = compile_layout([sink(1) | diagonals(0, 4), window(3)], 12)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, bias)]
    assert torch.autograd.gradcheck(lambda q, k, v, b: attend(q, k, v, layout, key_bias=b, backend="portable"), tensors)
