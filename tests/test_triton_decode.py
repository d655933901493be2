"""Triton's decode kernels, interpreted, against the float64 oracle: masks that differ within a KV group are read together."""

from importlib.util import find_spec

import pytest
import torch

from attnsieve import Spans, compile_layout
from attnsieve.backends.call import Call
from attnsieve.layout import Layout
from attnsieve.patterns import FOREVER, columns, dense, diagonals, dilated, empty, random_blocks, sink, window
from attnsieve.testing import assert_within_budget, relative_error
from tests.gpu_compiler import compiled
from tests.interpreter import needs_interpreter
from tests.laws.samples import captured, dam

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# Every kind of place: near and far columns, windows, far distances that meet columns, holes, nothing, everything.
KINDS = [
    sink(2) | window(9),
    columns(3, 50, 90, 161) | diagonals(0, 40, 151),
    diagonals(0, 4, 60) | columns(0, 70),
    empty(),
    dilated(9, step=7),
    window(140) | columns(*range(0, 200, 9)),
    dam(20, (0, 7), (0, 1, 6)),
    dense(),
]


def make(layout, *, group, kv_heads=1, q_len=1, n=201, width=16, v_width=None, dtype=torch.float16, spans=None):
    spans = Spans.full(1, q_len, n) if spans is None else spans
    batch = int(spans.batch.max()) + 1
    q = torch.randn(batch, kv_heads * group, q_len, width, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, n, w, dtype=dtype) for w in (width, v_width or width))
    return Call(q, k, v, layout, spans, width**-0.5, torch.randn(batch, kv_heads, n))


def check(call, tuning=None):
    from attnsieve.backends.triton.decode import decode

    assert_within_budget(*decode(call, tuning), call)


@needs_interpreter
@pytest.mark.parametrize(("group", "width"), [(1, 64), (3, 24), (4, 128), (7, 64), (8, 80)])
def test_groups_of_different_heads(group, width):
    row = [KINDS[(3 * h) % len(KINDS)] for h in range(2 * group)]
    check(make(compile_layout(row, 256), group=group, kv_heads=2, width=width, v_width=40, q_len=2))


@needs_interpreter
def test_more_heads_than_a_word_has_bits():
    check(make(compile_layout([KINDS[h % 8] for h in range(34)], 210), group=34))


@needs_interpreter
@pytest.mark.parametrize("n", [1, 2, 20, 33, 129, 150, 162, 230])
def test_every_length_of_a_text(n):
    check(make(compile_layout([*KINDS, KINDS[1]], 256), group=3, kv_heads=3, n=n))


@needs_interpreter
def test_rows_inside_the_corners_of_some_heads():
    row = [
        captured(24) | random_blocks(3, block=16) | window(9),
        captured(40),
        window(3) | columns(1, 30),
        dam(33, (0, 5), (0, 30)),
    ]
    check(make(compile_layout(row, 90), group=2, kv_heads=2, q_len=6, n=41))
    check(make(compile_layout(row[:2], 90), group=2, kv_heads=2, q_len=3, n=25))


@needs_interpreter
@pytest.mark.parametrize("together", [5, 128])
def test_sequences_of_different_length_beside_garbage(together, monkeypatch):
    monkeypatch.setattr("attnsieve.backends.triton.decode._DEALT_TOGETHER", together)
    pads = torch.tensor([198, 61, 0, 201])
    call = make(compile_layout(KINDS, 256), group=4, kv_heads=2, q_len=3, spans=Spans.left_padded(pads, 3, 201))
    clean = Call(call.q, call.k.clone(), call.v.clone(), call.layout, call.spans, call.scale, call.key_bias)
    for b, pad in enumerate(pads.tolist()):
        call.k[b, :, :pad] = call.v[b, :, :pad] = torch.nan
        clean.k[b, :, :pad] = clean.v[b, :, :pad] = 0
    from attnsieve.backends.triton.decode import decode

    assert_within_budget(*decode(call), clean)


@needs_interpreter
@pytest.mark.parametrize("programs", [1, 3, 20])
def test_shares(programs):
    from attnsieve.backends.triton.shares import Tuning

    row = [KINDS[7], KINDS[3], KINDS[0], KINDS[3], KINDS[3], KINDS[3]]
    check(make(compile_layout(row, 201), group=2, kv_heads=3), Tuning(16, 4, 2, programs))


@needs_interpreter
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("passing", [False, True])
def test_ends_of_any_kind(sequences, passing):
    end = torch.randint(0, 260, (sequences, 6, 201)).masked_fill(torch.rand(sequences, 6, 201) < 0.1, FOREVER).int()
    layout = Layout(201, end, torch.rand(sequences, 6, 201) < 0.05, passing=passing)
    spans = Spans.left_padded(torch.tensor([0, 11][:sequences]), 2, 201)
    check(make(layout, group=3, kv_heads=2, q_len=2, spans=spans))


@needs_interpreter
@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
@pytest.mark.parametrize("j", [17, 90, 195])
def test_what_is_not_finite_reaches_only_heads_that_keep_its_key(where, value, j):
    from attnsieve.backends.triton.decode import decode

    row = [window(20), columns(17, 90), diagonals(0, 110, 183), captured(12) | columns(90, start=12) | window(7)]
    call = make(compile_layout(row, 201), group=2, kv_heads=2, v_width=24)
    clean, clean_lse = decode(call)
    (call.k if where == "k" else call.v)[:, :, j, 3] = value
    out, lse = decode(call)
    keeps = call.layout.dense(torch.tensor([200]), torch.tensor([j]))[..., 0]
    assert 0 < int(keeps.sum()) < keeps.numel()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    assert torch.equal(lse.isnan(), keeps & (where == "k"))
    assert relative_error(out[~keeps], clean[~keeps].double()) < 1e-3
    assert torch.equal(lse[~keeps], clean_lse[~keeps])


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_a_key_is_listed_once_for_all_heads_of_a_group():
    from attnsieve.backends.triton.decode_rule import rule

    row = [columns(3, 50, 90) | window(8), columns(50, 90, 100) | window(8) | diagonals(8, 30), dense(), columns(4)]
    found = rule(compile_layout(row, 128), 2)
    columns_of, distances_of = found.entries[:, : found.room_columns], found.entries[:, found.room_columns :]
    assert [[x for x in part.tolist() if x != FOREVER] for part in columns_of] == [[3, 50, 90, 100], []]
    assert [[x for x in part.tolist() if x != FOREVER] for part in distances_of] == [[30], []]
    assert found.reach.tolist() == [9, 128]
    assert found.by_key[:, [3, 4, 50, 100]].tolist() == [[1, 0, 3, 2], [0, 2, 0, 0]]
    assert rule(compile_layout([dense()] * 4, 128), 2).listed is False


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_masks_chosen_from_the_input_are_not_read_back(monkeypatch):
    from attnsieve.backends.triton.decode_rule import rule

    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("reads the device"))
    for layout in (Layout(9, torch.zeros(1, 2, 9).int(), passing=True), Layout(9, torch.zeros(2, 2, 9).int())):
        assert rule(layout, 2).entries is None


PROGRAM = """
import torch
from attnsieve import Spans, compile_layout
from attnsieve.backends.call import Call
from attnsieve.backends.triton.decode import decode
from attnsieve.patterns import *

row = {row}
q, k = (torch.zeros(1, heads, 1, {width}, dtype={dtype}) for heads in (8, 2))
decode(Call(q.expand(1, 8, 1, -1), k.expand(1, 2, 1, -1), k, compile_layout(row, 300), Spans.full(1, 1, 1), 0.1))
"""
ROWS = [
    ("[columns(h, 99) | window(9) | diagonals(0, h, 250) for h in range(8)]", 128, "torch.bfloat16"),
    ("[random_blocks(1, block=16) | window(7)] * 2", 80, "torch.float32"),
]


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize(("row", "width", "dtype"), ROWS)
def test_kernels_compile_for_a_gpu(row, width, dtype):
    assert compiled(PROGRAM.format(row=row, width=width, dtype=dtype)) == ["decode_kernel", "combine_kernel"]
