"""The dense backend: exact where a layout keeps everything, refused everywhere else."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, UserError, attend, compile_layout
from attnsieve.backends import dense as backend
from attnsieve.backends.call import Call
from attnsieve.backends.facts import Facts, facts
from attnsieve.layout import Layout
from attnsieve.patterns import columns, dense, diagonals, random_blocks, sink, window
from attnsieve.testing import assert_within_budget


def make(q_len, k_len, heads=4, kv_heads=2, dtype=torch.float32, batch=2, width=24, patterns=None, capacity=None, bias=False):
    q = torch.randn(batch, heads, q_len, width, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, k_len, width, dtype=dtype) for _ in range(2))
    layout = compile_layout(patterns or [dense()], capacity or k_len)
    if len(layout.end[0]) == 1:
        layout = compile_layout([(patterns or [dense()])[0]] * heads, capacity or k_len)
    key_bias = torch.randn(batch, kv_heads, k_len) if bias else None
    return Call(q, k, v, layout, Spans.full(batch, q_len, k_len), width**-0.5, key_bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 70), (1, 70), (33, 70), (69, 70), (1, 1)])
def test_equals_the_oracle(q_len, k_len, dtype):
    call = make(q_len, k_len, dtype=dtype)
    assert backend.why_not(call) is None
    assert_within_budget(*backend.run(call), call)


@pytest.mark.parametrize("backend", ["dense", "auto"])
@pytest.mark.parametrize(("q_len", "heads"), [(70, 4), (1, 4), (33, 2)])
def test_memory_may_be_laid_out_in_another_way(q_len, heads, backend):
    def turns(x):
        yield x.mT.contiguous().mT
        yield x[:, :, :1].expand_as(x)
        yield torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1]

    call = make(q_len, 70, heads)
    for q, k, v in zip(*map(turns, (call.q, call.k, call.v)), strict=True):
        out, lse = attend(q, k, v, call.layout, backend=backend, return_lse=True)
        assert_within_budget(out, lse, replace(call, q=q, k=k, v=v))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive_are_computed_elsewhere(scale):
    call = replace(make(33, 70), scale=scale)
    out, lse = attend(call.q, call.k, call.v, call.layout, scale=scale, return_lse=True)
    assert_within_budget(out, lse, call)
    with pytest.raises(UserError, match="positive scales"):
        attend(call.q, call.k, call.v, call.layout, scale=scale, backend="dense")


def test_refuses_widths_that_differ():
    call = make(70, 70)
    narrow = call.v[..., :8]
    assert attend(call.q, call.k, narrow, call.layout).shape[-1] == 8
    with pytest.raises(UserError, match="equal widths, got 24 and 8"):
        attend(call.q, call.k, narrow, call.layout, backend="dense")


def test_a_capacity_beyond_the_keys_is_dense_too():
    call = make(50, 50, capacity=64)
    out, lse = attend(call.q, call.k, call.v, call.layout, backend="dense", return_lse=True)
    assert_within_budget(out, lse, call)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("leaves pairs out", {"patterns": [window(9)]}),
        ("leaves pairs out", {"patterns": [dense(), dense(), dense(), sink(1) | window(3)]}),
        ("key bias", {"bias": True}),
    ],
)
def test_refuses_by_name(named, change):
    call = make(**({"q_len": 70, "k_len": 70} | change))
    assert named in backend.why_not(call)


def test_refuses_padding_gradients_and_foreign_slots():
    call = make(70, 70)
    padded = Spans.left_padded(torch.tensor([0, 7]), 70, 70)
    with pytest.raises(UserError, match="padding"):
        attend(call.q, call.k, call.v, call.layout, spans=padded, backend="dense")
    # Spans made for fewer keys than there are slots say nothing about the rest.
    with pytest.raises(UserError, match="padding"):
        attend(call.q[:, :, :60], call.k, call.v, call.layout, spans=Spans.full(2, 60, 60), backend="dense")
    with pytest.raises(UserError, match="gradient"):
        attend(call.q.requires_grad_(), call.k, call.v, call.layout, backend="dense")


def test_merging_two_halves_equals_the_whole_also_where_rows_are_empty():
    rows = torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]])
    others = torch.tensor([[-0.5, 2.0, -torch.inf, -torch.inf]])
    out_1, out_2 = torch.tensor([[[1.0], [0.0], [3.0], [0.0]]]), torch.tensor([[[2.0], [5.0], [0.0], [0.0]]])
    out, lse = backend.merge((out_1, rows), (out_2, others))
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(out.flatten(), torch.tensor([share + 2 * (1 - share), 5.0, 3.0, 0.0]))
    torch.testing.assert_close(lse.flatten()[1:], torch.tensor([2.0, 1.0, -torch.inf]))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([dense(), dense()], Facts(dense=True)),
        ([window(40), window(300)], Facts(dense=True)),
        ([window(9), window(9)], Facts(window=9)),
        ([window(9), window(8)], Facts()),
        ([window(9) | sink(1)] * 2, Facts()),
        ([window(9) | diagonals(20)] * 2, Facts()),
        ([dense(), columns(3)], Facts()),
        ([random_blocks(1, block=16)] * 2, Facts(only_blocks=True)),
        ([random_blocks(1, block=16) | window(3), random_blocks(1, block=16)], Facts()),
        ([diagonals(0, 3)] * 2, Facts()),
    ],
)
def test_facts(patterns, expected):
    assert facts(compile_layout(patterns, 40)) == expected


def test_facts_of_a_captured_corner_and_of_bounded_rows_are_none():
    end = torch.full((1, 1, 8), 8, dtype=torch.int32)
    assert facts(Layout(8, end)) == Facts(dense=True)
    assert facts(Layout(8, end, most_keys=8)) == facts(Layout(8, end, passing=True)) == Facts()
    corner = torch.full((1, 4, 1), 255, dtype=torch.uint8)
    assert facts(Layout(8, end, corner=corner, corner_rows=torch.tensor([4], dtype=torch.int32))) == Facts()


def test_compiled_gradients_through_auto_where_dense_is_the_fastest():
    """The forward pass may run dense, the backward pass must not: dense kernels give no gradient through the LSE."""
    call = make(40, 40)

    def loss(q):
        out, lse = attend(q, call.k, call.v, call.layout, return_lse=True)
        return (out.square().sum() + lse.sum()).float()

    leaves = [call.q.clone().requires_grad_() for _ in range(2)]
    loss(leaves[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
