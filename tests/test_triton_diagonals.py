"""Scattered diagonals: which they are, and prefill pair by pair, interpreted, against the float64 oracle."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Layout, Spans, compile_layout
from attnsieve.backends import cost_work
from attnsieve.backends import triton as backend
from attnsieve.backends.call import Call
from attnsieve.patterns import FOREVER, diagonals, window
from attnsieve.testing import assert_within_budget
from tests.gpu_compiler import compiled
from tests.interpreter import needs_interpreter
from tests.lifetimes import assert_nothing_outlives

kernels = pytest.importorskip("attnsieve.backends.triton.diagonals", exc_type=ImportError)
scattered = pytest.importorskip("attnsieve.backends.triton.scattered", exc_type=ImportError).scattered
function = pytest.importorskip("attnsieve.backends.triton.function", exc_type=ImportError)
hopper = pytest.importorskip("attnsieve.backends.triton.hopper", exc_type=ImportError)

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")]
N = 680
PROGRAM = """
import torch
from attnsieve import Layout, Spans
from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import places_of, rows_of
from attnsieve.backends.triton.diagonals import PrefillInParts
from attnsieve.backends.triton.outputs import new_outputs
from attnsieve.backends.triton.scattered import scattered

n, tensor = 1000, lambda heads: torch.zeros(1, heads, 1000, 128, dtype=torch.bfloat16)
layout = Layout(n, torch.zeros(1, 2, n, dtype=torch.int32), (torch.arange(n) % 40 == 0).expand(1, 2, n))
call = Call(tensor(14), tensor(2), tensor(2), layout, Spans.full(1, n, n), 0.1)
bias = rows_of(torch.zeros(1, 2, n, 4))
run = PrefillInParts(call, lambda q, k, v, bias, places: new_outputs(q, v), scattered(call))
run(call.q, call.k, call.v, bias, places_of(call.spans))
"""


@pytest.fixture(autouse=True)
def _garbage_in_new_memory():
    """torch.empty gives NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layout_of(heads, *, n=N, width=5, columns=7, offsets=20, together=(), seed=0):
    """A window and columns, and diagonals at random, one in each part of the text, for each head others; one lies within the window,
    one right behind it."""
    generator = torch.Generator().manual_seed(seed)
    end = (torch.arange(n, dtype=torch.int32) + width).repeat(1, heads, 1)
    offset = torch.zeros(1, heads, n, dtype=torch.bool)
    for h in range(heads):
        end[0, h, torch.randperm(n, generator=generator)[:columns]] = FOREVER
        part = n // (offsets + h)
        offset[0, h, torch.arange(offsets + h) * part + torch.randint(part, (offsets + h,), generator=generator)] = True
        offset[0, h, [0, width, *together]] = True
    return Layout(n, end, offset)


def call_of(layout, *, batch=1, group=2, kv_heads=2, q_len=None, width=64, spans=None, bias=True, dtype=torch.float16):
    n = layout.length
    q_len = n if q_len is None else q_len
    q = torch.randn(batch, kv_heads * group, q_len, width, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, n, width, dtype=dtype)
    key_bias = torch.randn(batch, kv_heads, n) if bias else None
    return Call(q, k, v, layout, Spans.full(batch, q_len, n) if spans is None else spans, width**-0.5, key_bias)


def check(call):
    assert scattered(call) is not None
    out, lse = backend.run(call)
    assert_within_budget(out, lse, call)


def test_the_parts_share_no_pair_and_are_the_layout():
    layout = layout_of(2, together=range(200, 230))
    parts = scattered(call_of(layout))
    assert parts is not None
    assert parts.rest.offset is not None
    for h in range(2):
        alone = torch.zeros(N + 1, dtype=torch.bool)
        alone[parts.offsets[h].long()] = True
        alone = alone[:N]
        assert not bool((alone & parts.rest.offset[0, h]).any())
        assert torch.equal(alone | parts.rest.offset[0, h], layout.offset[0, h])
        # Thirty in succession share their tiles.
        assert not bool(alone[200:230].any())
    assert torch.equal(parts.rest.end, layout.end)


def test_lists_serve_the_rest_on_hopper(monkeypatch):
    call = call_of(layout_of(4), width=128, q_len=200)
    assert scattered(call).rest.most_keys is None
    monkeypatch.setattr(hopper, "is_there", lambda call: True)
    parts = scattered(call)
    kept = replace(call.layout, offset=None).dense(torch.arange(N), torch.arange(N))
    assert parts.rest.most_keys == int(kept.sum(-1).max())
    monkeypatch.undo()
    # What another kernel then computes of it here.
    monkeypatch.setattr(function, "scattered", lambda call: parts)
    assert_within_budget(*backend.run(call), call)


@pytest.mark.parametrize(
    ("width", "window", "together", "corner_rows"),
    [(64, 5, (), None), (128, 100, (), None), (128, 5, range(200, 230), None), (128, 5, (), 8)],
    ids=["narrow heads", "long rows", "clusters", "corner"],
)
def test_tiles_serve_other_rests_on_hopper(width, window, together, corner_rows, monkeypatch):
    monkeypatch.setattr(hopper, "is_there", lambda call: True)
    layout = layout_of(4, width=window, together=together)
    if corner_rows is not None:
        rows = torch.full((4,), corner_rows, dtype=torch.int32)
        layout = replace(layout, corner=torch.zeros(4, corner_rows, 1, dtype=torch.uint8), corner_rows=rows)
    assert scattered(call_of(layout, width=width)).rest.most_keys is None


def test_a_few_that_share_tiles_go_along_with_many_that_do_not():
    layout = layout_of(2, n=8000, offsets=60, together=range(300, 309))
    parts = scattered(call_of(layout))
    assert parts is not None
    assert parts.rest.offset is None
    assert int((parts.offsets < 8000).sum()) == int(layout.offset.sum())


def test_offsets_below_a_tile():
    parts = scattered(call_of(layout_of(1, together=[127, 128]), kv_heads=1))
    offsets = parts.offsets[0, :-1]
    inside, touching = parts.below(64)[:, 0].tolist()
    tiles = -(-N // 64)
    assert inside == [int((offsets <= 64 * t).sum()) for t in range(tiles)]
    assert touching == [int((offsets <= min(64 * t + 63, N - 1)).sum()) for t in range(tiles)]


@pytest.mark.parametrize(
    "change",
    [{"offset": None}, {"passing": True}, {"offset": torch.arange(N).expand(1, 4, N) < 40}],
    ids=["no offsets", "chosen", "a band"],
)
def test_other_layouts_go_by_tiles(change):
    assert scattered(call_of(layout_of(4))) is not None
    assert scattered(call_of(replace(layout_of(4), **change))) is None


def test_few_diagonals_other_widths_and_float32_go_by_tiles():
    assert scattered(call_of(layout_of(4, offsets=9))) is None
    assert scattered(call_of(layout_of(4), width=80)) is None
    assert scattered(call_of(layout_of(4), dtype=torch.float32)) is None
    call = call_of(layout_of(4))
    assert scattered(replace(call, v=call.v[..., :32])) is None


def test_masks_of_each_sequence_go_by_tiles():
    layout = layout_of(4)
    own = Layout(N, layout.end.expand(2, 4, N).contiguous(), layout.offset.expand(2, 4, N))
    assert scattered(call_of(own, batch=2)) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "bias", "q_len"),
    [(2, 2, 64, True, N), (2, 1, 64, True, N), (2, 2, 128, False, 170), (4, 2, 128, False, 170)],
    ids=["shared", "own", "shared, wide, chunk", "own, wide, chunk"],
)
def test_masks_of_kv_heads_and_of_query_heads(heads, kv_heads, width, bias, q_len):
    check(call_of(layout_of(heads, together=range(300, 320)), kv_heads=kv_heads, width=width, bias=bias, q_len=q_len))


def test_a_group_that_is_no_power_of_two():
    check(call_of(layout_of(1), group=3, kv_heads=1, q_len=250))


@pytest.mark.parametrize("q_len", [33, 200])
def test_chunks_and_padding_that_holds_nan(q_len):
    pads = (0, 201)
    call = call_of(layout_of(2), batch=2, q_len=q_len, spans=Spans.left_padded(torch.tensor(pads), q_len, N))
    for b, pad in enumerate(pads):
        call.k[b, :, :pad] = torch.nan
        call.v[b, :, :pad] = torch.nan
    check(call)


def test_packed_documents():
    check(call_of(layout_of(1), kv_heads=1, spans=Spans.packed([300, 1, 277, 70])))


def test_rows_of_a_corner_follow_the_corner():
    layout = layout_of(2)
    corner = torch.randint(0, 256, (2, 40, 5), dtype=torch.uint8)
    check(call_of(replace(layout, corner=corner, corner_rows=torch.tensor([40, 7], dtype=torch.int32))))


def test_rows_that_keep_nothing_else():
    """Their weights have no LSE to be relative to; rows above the first diagonal keep nothing at all."""
    layout = layout_of(2)
    offset = layout.offset.clone()
    offset[..., :30] = False
    call = call_of(replace(layout, end=torch.zeros_like(layout.end), offset=offset))
    call.q.mul_(30)
    out, lse = backend.run(call)
    assert bool((lse == -torch.inf).any())
    assert_within_budget(out, lse, call)


def test_rows_that_keep_nothing_else_and_whose_scores_are_all_low():
    """As weights relative to nothing they would all be 0."""
    layout = layout_of(1)
    call = call_of(replace(layout, end=torch.zeros_like(layout.end)), group=1, kv_heads=1, bias=False, q_len=100)
    call.q[..., 0] = 60
    call.k[..., 0] = -30
    check(call)


def test_scores_far_above_those_of_other_keys():
    """Relative to the LSE of other keys the weights are beyond float32."""
    call = call_of(layout_of(2), bias=False, q_len=300)
    call.k[..., 0] = 0
    call.q[..., 0] = 30
    call.k[:, :, 300:304, 0] = 60
    check(call)


@pytest.mark.parametrize(("score", "last_values"), [(90, 0.01), (85, 1000)])
def test_sums_alone_beyond_float32(score, last_values):
    """Of weights, of which none is, nor their products with small values; and of the last values of a row."""
    layout = compile_layout([window(5) | diagonals(*range(100, 484, 24))], length=600)
    call = call_of(layout, group=1, kv_heads=1, bias=False, q_len=80, width=128)
    call.q[..., 1:] = 0
    call.q[..., 0] = score / call.scale
    call.k[..., 0] = (torch.arange(600) < 400).half()
    call.v[..., :64] *= 0.01
    call.v[..., 64:] *= last_values
    check(call)


def test_nothing_outlives_its_layout():
    def layout_used():
        layout = layout_of(1)
        backend.run(call_of(layout, kv_heads=1, q_len=20))
        return layout

    assert_nothing_outlives(layout_used)


@pytest.mark.parametrize(
    ("where", "at", "value"), [("k", 3, torch.nan), ("v", 3, torch.nan), ("v", 3, torch.inf), ("v", 100, torch.nan)]
)
def test_what_is_not_finite_reaches_only_rows_that_keep_its_key(where, at, value):
    call = call_of(layout_of(2), bias=False, q_len=200, width=128 if at > 64 else 64)
    clean, _ = backend.run(call)
    getattr(call, where)[:, :, 140, at] = value
    out, _ = backend.run(call)
    keeps = call.layout.dense(torch.arange(N - 200, N), torch.tensor([140]))[..., 0].repeat_interleave(2, 1)
    assert 8 < int(keeps.sum()) < keeps.numel()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    torch.testing.assert_close(out[~keeps], clean[~keeps], rtol=0, atol=2e-3)


def test_gradients_are_those_of_the_whole_layout():
    call = call_of(layout_of(1), group=1, kv_heads=1, bias=False)
    inputs = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    out, _ = backend.run(call)
    found = torch.autograd.grad(out.float().square().sum(), inputs)
    rows = torch.arange(N)
    scores = (call.q.double() @ call.k.double().mT * call.scale).masked_fill(~call.layout.dense(rows, rows), -torch.inf)
    expected = torch.autograd.grad((scores.softmax(-1) @ call.v.double()).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0.02, atol=0.02)


def test_keys_and_values_in_any_order_of_memory():
    call = call_of(layout_of(2), bias=False, q_len=200)
    expected, _ = backend.run(call)
    views = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    found, _ = backend.run(replace(call, **views))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("heads", "begun"), [(3, 1), (9, 1), (9, 42)], ids=["shared", "own", "six heads, then three"])
def test_tiles_of_some_heads_after_those_of_others(heads, begun, monkeypatch):
    monkeypatch.setattr(kernels, "_BEGUN", begun)
    check(call_of(layout_of(heads, offsets=17), group=3, kv_heads=3, batch=2))


def test_programs_that_look_for_several_tiles_to_attend_to_again(monkeypatch):
    """Rows keep nothing but diagonals in some of the heads."""
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_LOOKED_UP", type(kernels._LOOKED_UP)(2))
    layout = layout_of(6, offsets=17)
    layout.end[0, 1::2] = 0
    check(call_of(layout, group=3, kv_heads=2, batch=2))


def test_predictions_count_pairs_of_diagonals():
    layout = compile_layout([window(4) | diagonals(*range(100, N, 34))] * 2, length=N)
    call = call_of(layout)
    pairs = 4 * sum(N - offset for offset in range(100, N, 34))
    amounts = cost_work.work(call, "triton")
    unit = cost_work.work(replace(call, layout=compile_layout([window(4)] * 2, length=N)), "triton")
    assert amounts is not None
    assert unit is not None
    # The heads of a KV group share them.
    assert amounts.pop("diagonal") == pytest.approx(0.8 * pairs * (0.2 + 0.8 / 2) / 1e9)
    assert amounts == unit


def test_predictions_count_tiles_of_diagonals_that_lie_alone_once_others_are_gone(monkeypatch):
    clusters = [start + offset for start in range(100, 1240, 190) for offset in range(0, 121, 20)]
    call = call_of(compile_layout([window(4) | diagonals(*clusters)], length=1300), kv_heads=1)
    rest = scattered(call).rest
    assert scattered(replace(call, layout=replace(rest))).rest.offset is None
    amounts = cost_work.work(call, "triton")
    del amounts["diagonal"]
    monkeypatch.setattr("attnsieve.backends.triton.scattered._LEAST", len(clusters))
    assert amounts == cost_work.work(replace(call, layout=replace(rest)), "triton")


def test_the_kernels_compile():
    """The interpreter knows neither bfloat16 nor the instructions that widen it."""
    assert compiled(PROGRAM) == ["diagonals_kernel", "diagonals_again_kernel"]
