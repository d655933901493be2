"""Calls like an earlier one skip checks and choices, never answers or refusals; nothing that is remembered outlives its layout."""

import contextlib
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from attnsieve import Spans, UserError, attend, attention, compile_layout
from attnsieve.backends import kinds, whole
from attnsieve.backends.call import Call
from attnsieve.patterns import columns, diagonals, sink, window
from attnsieve.testing import assert_within_budget
from tests.interpreter import needs_interpreter
from tests.lifetimes import assert_nothing_outlives

BACKENDS = ["portable", pytest.param("triton", marks=needs_interpreter)]
ROW = [sink(2) | window(9), columns(0, 7, 30) | window(5), diagonals(0, 1, 12), window(20)]


def inputs(q_len=40, n=40, width=16, **options):
    return [torch.randn(1, heads, length, width, **options) for heads, length in ((4, q_len), (2, n), (2, n))]


@pytest.fixture
def checks(monkeypatch):
    """The calls that were checked."""
    seen, check = [], attention._check
    monkeypatch.setattr(attention, "_check", lambda call: (seen.append(call), check(call)))
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_of_a_known_kind_are_right_and_not_checked(backend, checks):
    layout = compile_layout(ROW, 64)
    for _ in range(3):
        q, k, v = inputs()
        out, lse = attend(q, k, v, layout, backend=backend, return_lse=True)
        assert_within_budget(out, lse, Call(q, k, v, layout, Spans.full(1, 40, 40), 0.25))
    assert len(checks) == 1


@needs_interpreter
@pytest.mark.parametrize("q_len", [1, 3])
def test_texts_that_grow_are_of_one_kind(q_len, checks):
    layout = compile_layout(ROW, 64)
    for n in (33, 34, 48, 63):
        q, k, v = inputs(q_len, n)
        out, lse = attend(q, k, v, layout, backend="triton", return_lse=True)
        assert_within_budget(out, lse, Call(q, k, v, layout, Spans.full(1, q_len, n), 0.25))
    assert len(checks) == 1


@needs_interpreter
def test_memory_may_be_laid_out_in_another_way():
    layout = compile_layout(ROW, 64)
    for turn in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        q, k, v = map(turn, inputs())
        out, lse = attend(q, k, v, layout, backend="triton", return_lse=True)
        assert_within_budget(out, lse, Call(q, k, v, layout, Spans.full(1, 40, 40), 0.25))


SPOILT = {
    "longer than the layout": lambda q, k, v: (q, *(x.repeat(1, 1, 9, 1) for x in (k, v))),
    "fewer keys than queries": lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]),
    "dtypes": lambda q, k, v: (q, k.half(), v),
    "devices": lambda q, k, v: (q, k.to("meta"), v),
    "heads": lambda q, k, v: (q[:, :3], k, v),
    "values": lambda q, k, v: (q, k, v[:, :, :-1]),
    "batch": lambda q, k, v: (q.expand(2, -1, -1, -1), k, v),
    "width": lambda q, k, v: (q[..., :8], k, v),
    "dimensions": lambda q, k, v: (q, k[0], v),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [40, 3])
@pytest.mark.parametrize("how", SPOILT)
def test_what_is_refused_at_first_is_refused_later(how, q_len, backend):
    good, layout = inputs(q_len), compile_layout([window(9)] * 4, 64)
    for _ in range(3):
        attend(*good, layout, backend=backend)
    with pytest.raises(UserError):
        attend(*SPOILT[how](*good), layout, backend=backend)
    with pytest.raises(UserError, match="unknown backend"):
        attend(*good, layout, backend="none")
    if backend == "triton":
        with pytest.raises(UserError, match="scale"):
            attend(*good, layout, backend=backend, scale=-1.0)


def test_spans_on_a_cpu_are_read_at_every_call():
    q, k, v = inputs()
    layout, spans = compile_layout(ROW, 64), Spans.full(1, 40, 40)
    attend(q, k, v, layout, spans=spans)
    attend(q, k, v, layout, spans=spans)
    with pytest.raises(UserError, match="does not fit"):
        attend(q, k, v, layout, spans=replace(spans, k_len=spans.k_len + 1))


def test_what_is_not_remembered():
    q, k, v = inputs()
    layout, device = compile_layout(ROW, 64), q.device
    kind = lambda *tensors, spans=None, of=layout: kinds.kind_of(*tensors, of, spans, None, "auto")  # noqa: E731
    assert kind(q, k, v) is not None
    assert kind(q.requires_grad_(), k, v) is None
    assert kind(q.detach(), k, v, of=replace(layout, passing=True)) is None
    assert kind(q.detach(), k, v, spans=Spans.packed([20, 20])) is None
    spans = Spans.full(1, 40, 40)
    assert spans.is_plain_on(device)
    assert not replace(spans, k_len=spans.k_len.int()).is_plain_on(device)
    assert not spans.is_plain_on(torch.device("meta"))


def test_kinds_are_bounded():
    layout = compile_layout([window(9)] * 4, 256)
    for n in range(9, 100):
        attend(*inputs(n, n), layout, backend="portable")
    assert 0 < len(kinds._kinds(layout)) <= kinds._MOST_KINDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [40, 1])
def test_nothing_outlives_its_layout(backend, q_len):
    def layout_used():
        layout = compile_layout(ROW, 64)
        for _ in range(3):
            attend(*inputs(q_len), layout, backend=backend)
        return layout

    assert_nothing_outlives(layout_used)


def test_spans_of_whole_batches_are_made_once():
    whole._spans.known.clear()
    q, k, _ = inputs()
    assert whole.whole_spans(q, k) is whole.whole_spans(q.clone(), k)
    assert whole.whole_spans(q, k[:, :, :30]).whole == (1, 40, 30)
    for n in range(200):
        assert whole.whole_spans(q, torch.empty(1, 2, n, 1)).k_len.tolist() == [n]
    assert len(whole._spans.known) <= whole._spans.MOST
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole.whole_spans(q, k[:, :, :7])
    assert whole.whole_spans(q, k[:, :, :7]).k_len.tolist() == [7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_a_layout_begin_anew(backend):
    layout, call = compile_layout(ROW, 64), inputs()
    first, others = attend(*call, layout, backend=backend), compile_layout([window(3)] * 4, 64)
    for one in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout)), copy.copy(layout)):
        assert not one.schedules
        assert layout.schedules
        torch.testing.assert_close(attend(*call, one, backend=backend), first)
    changed = replace(layout, end=others.end, offset=None)
    torch.testing.assert_close(attend(*call, changed, backend=backend), attend(*call, others, backend=backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_transforms_of_torch_leave_nothing_behind(transform, backend):
    whole._spans.known.clear()
    layout, (q, k, v) = compile_layout(ROW, 64), inputs()
    # Most backends cannot be transformed.
    with contextlib.suppress(RuntimeError):
        transform(lambda x: attend(q * x, k, v, layout, backend=backend).sum())(
            torch.ones(4 if transform is torch.vmap else ())
        )
    attend(q, k, v, layout, backend=backend)


@needs_interpreter
@pytest.mark.parametrize("backend", ["triton", "dense"])
@pytest.mark.parametrize("q_len", [1, 40])
def test_kernels_refuse_dual_tensors_also_in_a_known_kind(backend, q_len):
    layout = compile_layout([window(64)] * 4, 40)
    q, k, v = inputs(q_len)
    for _ in range(2):
        attend(q, k, v, layout, backend=backend)
    with forward_ad.dual_level():
        attend(q, k, v, layout, backend=backend)
        for place in range(3):
            tensors = [forward_ad.make_dual(x, x) if x is (q, k, v)[place] else x for x in (q, k, v)]
            with pytest.raises(UserError, match="forward-mode"):
                attend(*tensors, layout, backend=backend)
