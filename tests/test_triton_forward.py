"""Triton's kernels for prefill and decode, interpreted, against the float64 oracle: patterns, shapes, spans, garbage memory."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends import triton as backend
from attnsieve.backends.call import Call
from attnsieve.bench.masks import selected
from attnsieve.layout import Layout
from attnsieve.nn import SelectionRule
from attnsieve.patterns import columns, diagonals, empty, random_blocks, sink, window
from attnsieve.testing import assert_within_budget
from tests.interpreter import needs_interpreter
from tests.laws.samples import SAMPLES, dam, patterns

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")]
MIXED = [sink(2) | window(9), dam(20, (0, 7), (0, 1, 6)), diagonals(0, 40, 90), empty()]
EVERYTHING = dam(33, (0, 70), (0, 1, 60)) | window(20) | random_blocks(1, block=16)


@pytest.fixture(autouse=True)
def _garbage_in_new_memory():
    """torch.empty gives NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(layout, *, batch=1, group=2, kv_heads=1, q_len=None, n=130, width=24, v_width=None, dtype=torch.float16, spans=None):
    q_len = n if q_len is None else q_len
    q = torch.randn(batch, kv_heads * group, q_len, width, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, n, w, dtype=dtype) for w in (width, v_width or width))
    bias = torch.randn(batch, kv_heads, n)
    return Call(q, k, v, layout, Spans.full(batch, q_len, n) if spans is None else spans, width**-0.5, bias)


def check(call):
    out, lse = backend.run(call)
    assert_within_budget(out, lse, call)


@pytest.mark.parametrize("pattern", SAMPLES, ids=lambda pattern: str(pattern)[:40])
def test_patterns(pattern):
    call = make(compile_layout([pattern], 300), n=210)
    if backend.why_not(call):
        pytest.skip(backend.why_not(call))
    check(call)


@pytest.mark.parametrize(
    ("width", "group", "dtype"),
    [
        (24, 1, torch.float32),
        (64, 4, torch.bfloat16),
        (80, 7, torch.float16),
        (96, 8, torch.bfloat16),
        (128, 7, torch.float16),
        (256, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_widths_groups_and_types(width, group, dtype):
    check(make(compile_layout([EVERYTHING], 150), n=75, width=width, group=group, dtype=dtype))


@pytest.mark.parametrize(("rows", "keys"), [(128, 128), (64, 16)])
def test_tile_shapes(rows, keys):
    from attnsieve.backends.triton.forward import forward
    from attnsieve.backends.triton.geometry import Tiles

    patterns = [
        random_blocks(1, block=128) | diagonals(3, 40) | window(5),
        columns(0, 70, 129) | diagonals(0, 1, 131),
        dam(33, (0,), (2, 90)),
    ]
    call = make(compile_layout(patterns, 200), n=170, group=3)
    assert_within_budget(*forward(call, Tiles(rows, keys, 4, 2)), call)


@pytest.mark.parametrize("group", [7])
def test_masks_of_their_own_for_the_heads_of_a_group(group):
    check(make(compile_layout([MIXED[h % 4] for h in range(group)], 101), n=101, group=group, v_width=40))


@pytest.mark.parametrize("n", [1, 63, 64, 129])
def test_lengths(n):
    check(make(compile_layout([sink(1) | window(70) | columns(5, 64)], max(n, 10)), n=n))


@pytest.mark.parametrize(("width", "group"), [(24, 1), (64, 4), (80, 7), (128, 8)])
def test_decode(width, group):
    check(
        make(compile_layout([EVERYTHING] * 2, 300), q_len=2, n=201, width=width, group=group, kv_heads=2, dtype=torch.float32)
    )


def test_decode_with_masks_of_their_own():
    check(make(compile_layout(MIXED, 300), q_len=1, n=201, group=4, dtype=torch.bfloat16))


@pytest.mark.parametrize("q_len", [1, 90])
def test_selected_keys(q_len):
    check(make(selected(150, 2, "cpu", 30), n=150, group=4, kv_heads=2, q_len=q_len, dtype=torch.float32))


@pytest.mark.parametrize("q_len", [1, 90])
def test_masks_of_their_own_for_the_sequences(q_len):
    layout = Layout(120, SelectionRule(20, window=4).ends(torch.randn(2, 1, 120)))
    spans = Spans.left_padded(torch.tensor([0, 11]), q_len, 120)
    call = make(layout, batch=2, n=120, q_len=q_len, spans=spans)
    call.k[1, :, :11] = call.v[1, :, :11] = torch.nan
    out, lse = backend.run(call)
    call.k[1, :, :11] = call.v[1, :, :11] = 0
    assert_within_budget(out, lse, call)


@settings(max_examples=4)
@given(data=st.data())
def test_any_shape(data):
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3, 8]))
    n = data.draw(st.integers(1, 160))
    q_len, width = data.draw(st.integers(1, n)), data.draw(st.sampled_from([1, 5, 16]))
    heads = kv_heads * group if group < 8 and data.draw(st.booleans()) else kv_heads
    pool = data.draw(st.lists(patterns(), min_size=1, max_size=3))
    layout = compile_layout([pool[h % len(pool)] for h in range(heads)], n + data.draw(st.integers(0, 50)))
    pads = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=2)))
    spans = Spans.left_padded(pads, q_len, n)
    call = make(layout, batch=len(pads), group=group, kv_heads=kv_heads, q_len=q_len, n=n, width=width, v_width=3, spans=spans)
    assume(backend.why_not(call) is None)
    check(call)


def test_refuses_what_the_interpreter_gets_wrong():
    call = make(compile_layout([window(3)], 9), n=9, dtype=torch.bfloat16)
    assert "bfloat16" in backend.why_not(call)
    with pytest.raises(ValueError, match="bfloat16"):
        attend(call.q, call.k, call.v, call.layout, backend="triton")
