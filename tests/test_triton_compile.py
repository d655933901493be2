"""`attend` under torch.compile: one operation without graph breaks, right in values and gradients, with its layout known again."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, UserError, attend, compile_layout
from attnsieve.backends import graph
from attnsieve.backends.call import Call
from attnsieve.nn import dynamic_mask_attention
from attnsieve.patterns import columns, dense, diagonals, random_blocks, window
from tests.interpreter import needs_interpreter
from tests.laws.samples import dam

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::UserWarning:torch")
EVERYTHING = dam(20, (0, 40), (0, 1, 30)) | window(5) | random_blocks(1, block=16)
PLAIN = columns(0, 20) | diagonals(0, 7)


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(layout, n=70, dtype=torch.float32):
    shapes = ((1, 4, n, 8), (1, 2, n, 8), (1, 2, n, 8))
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return Call(q, k, v, layout, Spans.full(1, n, n), 0.3, torch.randn(1, 2, n, dtype=dtype, requires_grad=True))


def results(run, call):
    out, lse = run(call.q, call.k, call.v, call.key_bias)
    loss = out.sin().sum() + lse[:, :, 1:].cos().sum()
    return out, lse, *torch.autograd.grad(loss, [call.q, call.k, call.v, call.key_bias])


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [(EVERYTHING, "portable"), (PLAIN, "auto"), pytest.param(PLAIN, "triton", marks=needs_interpreter)],
    ids=["portable", "auto", "triton"],
)
def test_a_compiled_call_equals_an_eager_one(pattern, backend):
    layout = compile_layout([pattern] * 2, 70)
    call = make(layout, n=40, dtype=torch.float16 if backend == "triton" else torch.float32)

    def run(q, k, v, key_bias):
        return attend(q, k, v, layout, scale=0.3, key_bias=key_bias, backend=backend, return_lse=True)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled, call), results(run, call), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_schedules_of_a_static_layout_are_built_once():
    layout = compile_layout([window(5)] * 2, 70)
    call, built = make(layout), []
    compiled = torch.compile(lambda q: attend(q, call.k, call.v, layout), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(call.q.detach())
        _, known = getattr(layout.end, graph._KNOWN)
        built.append(dict(known.schedules))
    assert built[0]
    assert built[1:] == built[:-1]


def test_layouts_that_share_a_vector_are_told_apart():
    layout = compile_layout([window(5) | diagonals(9)] * 2, 70)
    call = make(layout)
    for one in (layout, replace(layout, offset=torch.zeros_like(layout.offset))):
        compiled = torch.compile(lambda q, one=one: attend(q, call.k, call.v, one), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(call.q), attend(call.q, call.k, call.v, one))


def test_layouts_of_one_call_are_not_remembered():
    layout = replace(compile_layout([window(5)] * 2, 70), passing=True)
    call = make(layout)
    torch.compile(lambda q: attend(q, call.k, call.v, layout), backend="aot_eager", fullgraph=True)(call.q)
    assert not hasattr(layout.end, graph._KNOWN)


def test_layouts_made_in_inference_mode():
    with torch.inference_mode():
        layout = compile_layout([window(5)] * 2, 70)
        call = make(layout)
        compiled = torch.compile(lambda q: attend(q, call.k, call.v, layout), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(call.q), attend(call.q, call.k, call.v, layout))


def test_bad_calls_raise_when_they_run():
    layout = compile_layout([window(5)] * 2, 60)
    call = make(layout)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, layout), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="compile a longer one"):
        compiled(call.q, call.k, call.v)


def test_selected_keys():
    n, make_leaf = 40, lambda *shape: torch.randn(*shape, requires_grad=True)
    inputs = make_leaf(1, 4, n, 8), make_leaf(1, 2, n, 8), make_leaf(1, 2, n, 8), make_leaf(2, 16), make_leaf(2)

    def run(q, k, v, weight, a):
        return dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, keep_window_size=7)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(*(torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("pattern", "backend"), [(EVERYTHING, "portable"), pytest.param(PLAIN, "triton", marks=needs_interpreter)]
)
def test_the_operation_is_what_it_says(pattern, backend):
    call = make(compile_layout([pattern, window(9)], 64), n=24, dtype=torch.float16 if backend == "triton" else torch.float32)
    torch.library.opcheck(torch.ops.attnsieve.attend.default, (*graph._arguments(call), backend))


@pytest.mark.parametrize("backend", ["dense", "portable", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("q_len", [24, 3])
def test_its_results_are_laid_out_as_graphs_are_told(q_len, backend):
    layout = compile_layout([dense() if backend == "dense" else window(9)] * 4, 64)
    tensors = [torch.randn(2, length, heads, 8).transpose(1, 2) for heads, length in ((4, q_len), (2, 24), (2, 24))]
    arguments = (*graph._arguments(Call(*tensors, layout, Spans.full(2, q_len, 24), 0.3)), backend)
    torch.library.opcheck(torch.ops.attnsieve.attend.default, arguments, test_utils="test_faketensor")
    if backend != "dense":
        out, lse = torch.ops.attnsieve.attend(*arguments)
        gradients = torch.ops.attnsieve.attend_backward.default
        torch.library.opcheck(gradients, (out, lse, out, lse, *arguments), test_utils="test_faketensor")


def test_the_reference_has_no_gradients_in_graphs_and_says_so():
    call = make(compile_layout([window(9)] * 4, 70))
    out = torch.compile(lambda q: attend(q, call.k, call.v, call.layout, backend="reference"), backend="aot_eager")(call.q)
    with pytest.raises(UserError, match="has no gradients"):
        out.sum().backward()
