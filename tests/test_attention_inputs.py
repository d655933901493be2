"""attend refuses what does not fit together, with a sentence that says what was given; on every device alike."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.errors import UserError
from attnsieve.patterns import dense, window
from tests.interpreter import needs_interpreter


def inputs(**change):
    """A call that is right, but for `change`."""
    shapes = {"q": (2, 4, 8, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16)}
    shapes |= {name: value for name, value in change.items() if name in shapes and isinstance(value, tuple)}
    call = {name: torch.randn(shape) for name, shape in shapes.items()}
    call["layout"] = compile_layout([window(3)] * change.get("heads", 4), change.get("length", 8))
    return call | {name: value for name, value in change.items() if name in ("key_bias", "spans", "backend")}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"must be \[batch, heads, tokens, width\]", {"q": (4, 8, 16)}),
        ("batch sizes differ", {"q": (3, 4, 8, 16)}),
        ("k must match v", {"v": (2, 2, 7, 16)}),
        ("q in width", {"q": (2, 4, 8, 32)}),
        ("multiple of KV heads", {"q": (2, 3, 8, 16)}),
        ("more queries than keys", {"q": (2, 4, 9, 16)}),
        ("the layout has 3 heads", {"heads": 3}),
        ("key_bias must have shape", {"key_bias": torch.zeros(2, 4, 8)}),
        ("key_bias on meta", {"key_bias": torch.zeros(2, 2, 8, device="meta")}),
        ("compiled for 6", {"length": 6}),
        ("does not fit", {"spans": Spans.of([(0, 0, 8, 2, 8)])}),
        ("share query slot 4 of batch row 1", {"spans": Spans.of([(1, 4, 4, 4, 4), (0, 0, 8, 0, 8), (1, 0, 5, 0, 5)])}),
        ("must be floating, got torch.bool", {"key_bias": torch.zeros(2, 2, 8, dtype=torch.bool)}),
        ("must be floating, got torch.complex64", {"key_bias": torch.zeros(2, 2, 8, dtype=torch.complex64)}),
        ("must be tensors, got Tensor, Tensor, Tensor, float", {"key_bias": 1.0}),
        ("spans must be Spans, got list", {"spans": [(0, 0, 8, 0, 8)]}),
        ("unknown backend", {"backend": "fastest"}),
        ("at least one", {"q": (2, 0, 8, 16)}),
        ("at least one wide", {"q": (2, 4, 8, 0), "k": (2, 2, 8, 0)}),
    ],
)
def test_refuses(message, change):
    with pytest.raises(UserError, match=message):
        attend(**inputs(**change))


def test_refuses_mixed_dtypes():
    call = inputs()
    with pytest.raises(UserError, match="dtypes differ"):
        attend(**(call | {"k": call["k"].half()}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_refuses_other_dtypes(dtype):
    call = inputs()
    with pytest.raises(UserError, match="not floating"):
        attend(**(call | {name: call[name].to(dtype) for name in "qkv"}))


def test_refuses_other_things():
    call = inputs()
    with pytest.raises(UserError, match="must be tensors, got ndarray, Tensor, Tensor"):
        attend(**(call | {"q": call["q"].numpy()}))
    for given in (window(3), [window(3)] * 4, None):
        with pytest.raises(UserError, match="layout must be a Layout"):
            attend(**(call | {"layout": given}))
    for rows in ([(0, 1, 2)], [tuple(range(10))]):
        with pytest.raises(UserError, match="spans are rows of"):
            Spans.of(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["batch", "q_start", "k_len"])
def test_refuses_spans_that_are_not_int64(name, dtype):
    spans = Spans.full(2, 8, 8)
    spans = replace(spans, **{name: getattr(spans, name).to(dtype)})
    with pytest.raises(UserError, match=f"spans are int64 tensors of one entry per sequence on one device, got .*{dtype}"):
        attend(**inputs(), spans=spans)
    with pytest.raises(UserError, match="spans are int64 tensors"):
        attend(**inputs(), spans=Spans(*[[0, 0]] * 5))


@pytest.mark.parametrize("backend", ["reference", "portable", "dense", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf, 3.5e38, -(10**400), torch.tensor(0.25), "0.25"])
def test_refuses_scales_that_are_no_finite_numbers(scale, backend):
    call = inputs(heads=4) | {"layout": compile_layout([dense()] * 4, 8), "backend": backend}
    for _ in range(2):
        with pytest.raises(UserError, match="scale must be a finite number in float32, got"):
            attend(**call, scale=scale)
        attend(**call, scale=0.25)


@pytest.mark.parametrize("backend", ["auto", "reference", "portable", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("rule", [window(3), dense()], ids=str)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 8, 8), (0, 1, 8), (1, 0, 8), (1, 0, 0)])
def test_nothing_is_computed_of_nothing(batch, queries, keys, rule, backend):
    call = inputs(q=(batch, 4, queries, 16), k=(batch, 2, keys, 16), v=(batch, 2, keys, 16))
    call |= {"layout": compile_layout([rule] * 4, 8), "backend": backend, "return_lse": True}
    for _ in range(2):
        out, lse = attend(**call)
        assert out.shape == (batch, 4, queries, 16)
        assert lse.shape == (batch, 4, queries)


@pytest.mark.parametrize("backend", ["reference", "portable", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("queries", [8, 9])
def test_slots_of_no_sequence_are_empty(queries, backend):
    call = inputs(q=(2, 4, queries, 16), k=(2, 2, 9, 16), v=(2, 2, 9, 16), length=9, spans=Spans.of([]), backend=backend)
    out, lse = attend(**call, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_takes_what_fits():
    assert attend(**inputs()).shape == (2, 4, 8, 16)
