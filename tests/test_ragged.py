"""Ragged storage: a step over it equals attention over all keys, and it stores no key that no later row reads."""

import copy
import os
import pickle
from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnsieve import UserError, compile_layout
from attnsieve.backends.call import Call
from attnsieve.patterns import columns, dense, diagonals, dilated, empty, random_blocks, sink, top_blocks, window
from attnsieve.patterns.static import Window
from attnsieve.ragged import Kept, RaggedStore
from attnsieve.spans import Spans
from attnsieve.testing import assert_within_budget
from tests.gpu_compiler import compiled
from tests.laws.samples import SAMPLES, dam, patterns

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
BACKEND = pytest.mark.parametrize("backend", ["portable", pytest.param("triton", marks=TRITON)])
STATIC = [pattern for pattern in SAMPLES if not any(atom.blocks(8) is not None for atom in pattern)]
CAPACITY = 140


def run(row, kv_heads, pieces, *, pads=(0,), backend="portable", width=16, v_width=8, dtype=torch.float16, programs=4):
    """Feed random tokens: several at once, or as negative pieces in single steps, which are compared with the oracle.

    Returns the store and the number of rows that were compared.
    """
    n, batch = sum(map(abs, pieces)), len(pads)
    q, k = torch.randn(batch, len(row), n, width, dtype=dtype), torch.randn(batch, kv_heads, n, width, dtype=dtype)
    v = torch.randn(batch, kv_heads, n, v_width, dtype=dtype)
    for b, pad in enumerate(pads):
        k[b, :, :pad], v[b, :, :pad] = torch.nan, torch.nan  # padding is never read
    kept = Kept.of(row, kv_heads, CAPACITY)
    store = RaggedStore(kept, kept.index(torch.device("cpu"), programs), k, v)
    layout, past, compared = compile_layout(row, CAPACITY), 0, 0
    for piece in pieces:
        end = past + abs(piece)
        if piece > 0:
            store.fill(k[:, :, past:end], v[:, :, past:end], pads, past)
        else:
            steps = [[tensor[:, :, at : at + 1] for tensor in (q, k, v)] for at in range(past, end)]
            out, lse = (
                torch.cat(parts, dim=2) for parts in zip(*(store.step(*step, 0.4, backend) for step in steps), strict=True)
            )
            first = max(past, max(pads) + kept.corner)
            spans = Spans.left_padded(torch.tensor(pads), end - first, end)
            call = Call(q[:, :, first:end], k[:, :, :end].nan_to_num(), v[:, :, :end].nan_to_num(), layout, spans, 0.4)
            assert_within_budget(out[:, :, first - past :], lse[:, :, first - past :], call)
            compared += end - first
        past = end
    return store, compared


# Every kind of place: columns inside and outside the ring, windows, distances with holes, nothing at all, everything.
MIXED = [
    sink(2) | window(9),
    columns(3, 50, 90) | diagonals(0, 40),
    diagonals(0, 4, 60) | columns(0, 70),
    empty(),
    dilated(9, step=7),
    window(3),
]


@pytest.mark.parametrize("pattern", STATIC, ids=lambda pattern: str(pattern)[:40])
def test_steps_equal_the_oracle(pattern):
    _, compared = run([pattern] * 4, 2, [36, -6, 40, -6])
    assert compared == 12


ROWS = {
    "mixed": MIXED,
    "with a dense head": [*MIXED[:3], dense(), *MIXED[:2]],
    "beyond a corner": [dam(20, (0, 7), (0, 1, 6)), MIXED[1]] * 3,
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_groups_of_different_heads(row, kv_heads):
    _, compared = run(ROWS[row], kv_heads, [30, -4, 37, -4], pads=(0, 5))
    assert compared >= 6


@TRITON
@pytest.mark.parametrize("row", ROWS)
def test_groups_in_triton(row):
    run(ROWS[row], 2, [45, -3], pads=(0, 5), backend="triton")


@BACKEND
@pytest.mark.parametrize("widths", [(16, 16), (24, 40), (80, 33)])
def test_widths(widths, backend):
    run(MIXED, 2, [50, -3], backend=backend, width=widths[0], v_width=widths[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    run(MIXED, 2, [50, -8], pads=(0, 1), dtype=dtype)


@BACKEND
def test_the_last_head_of_the_largest_group(backend):
    rules = [columns(h) | diagonals(h) for h in range(32)]
    run(rules, 1, [40, -4], backend=backend)
    with pytest.raises(UserError, match="33 query heads share"):
        Kept.of([*rules, dense()], 1, 100)


def test_rows_of_different_length():
    run(MIXED, 3, [30, -6, 20, -5], pads=(0, 3, 29, 30))  # the last row starts with the first step


@TRITON
def test_many_shares_in_triton(monkeypatch):
    monkeypatch.setattr("attnsieve.ragged.kept.LEAST_SHARE", 2)
    run([dense(), MIXED[1]], 1, [130, -2], backend="triton", programs=1000)


@TRITON
def test_rows_of_different_length_in_triton():
    run(MIXED[:3], 3, [30, -3, 20, -1], pads=(0, 30), backend="triton")


@BACKEND
@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
def test_what_is_not_finite_reaches_only_heads_that_keep_its_key(where, value, backend):
    row, n, j = [window(9), columns(40, 70), window(25), diagonals(0, 20) | columns(3)], 60, 40
    kept = Kept.of(row, 2, CAPACITY)
    q, k, v = (torch.randn(1, heads, n + 1, 16, dtype=torch.float16) for heads in (4, 2, 2))
    results = []
    for tensor in (None, k if where == "k" else v):
        if tensor is not None:
            tensor[:, :, j, 3] = value
        store = RaggedStore(kept, kept.index(torch.device("cpu"), 4), k, v)
        store.fill(k[:, :, :n], v[:, :, :n], [0], 0)
        results.append(store.step(q[:, :, n:], k[:, :, n:], v[:, :, n:], 0.4, backend))
    (clean, clean_lse), (out, lse) = results
    keeps = torch.tensor([bool(pattern.keep(torch.tensor(n), torch.tensor(j))) for pattern in row])
    assert keeps.tolist() == [False, True, True, True]
    assert torch.equal(out.isfinite().all(-1).flatten(), ~keeps)
    torch.testing.assert_close(out[:, ~keeps], clean[:, ~keeps])
    assert bool((lse.isnan() if where == "k" else lse == clean_lse)[:, keeps].all())


@given(data=st.data())
@settings(max_examples=12)
def test_any_patterns_in_any_pieces(data):
    pool = data.draw(st.lists(patterns(), min_size=1, max_size=3))
    assume(not any(atom.blocks(8) is not None for pattern in pool for atom in pattern))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    row = [pool[h % len(pool)] for h in range(kv_heads * group)]
    pieces = data.draw(st.lists(st.integers(1, 23), min_size=1, max_size=2))
    run(row, kv_heads, [45, *(sign * piece for piece in pieces for sign in (1, -1))], pads=(0, 2))


def stored_positions(store, length):
    """Per KV head the positions in its slots after `length` tokens."""
    head, position = store._positions(torch.tensor([[length]]))
    return [
        set(position[0, (head == h) & (position[0] >= 0) & (position[0] < length)].tolist()) for h in range(int(head.max()) + 1)
    ]


@pytest.mark.parametrize("n", [1, 20, 61, 110])
@pytest.mark.parametrize("row", [MIXED, STATIC[:6], [pattern for pattern in STATIC if pattern.corner_rows == 0][:9]], ids=len)
def test_stores_what_a_later_row_reads_and_no_more(row, n):
    """After n tokens: the keys that some row from n on keeps at some length, and the newest one."""
    capacity, far = 140, 400
    kept = Kept.of(row, len(row), capacity)
    store = RaggedStore(kept, kept.index(torch.device("cpu"), 4), *(torch.zeros(1, len(row), 1, 4) for _ in range(2)))
    rows, keys = torch.arange(max(n, kept.corner), far)[:, None], torch.arange(n)
    for pattern, stored in zip(row, stored_positions(store, n), strict=True):
        read = {int(key) for key in keys[pattern.keep(rows, keys).any(0)]}
        # A ring holds the key that the farthest distance read last until the next token takes its slot.
        assert read <= stored
        assert len(stored - read) <= 1 or kept.corner


@pytest.mark.parametrize("pieces", [[50], [20, 30], [7, -3, 11, -2, 27], [-50]], ids=str)
def test_text_holds_every_key_that_later_rows_read(pieces):
    torch.manual_seed(1)
    n, pads, row = 50, (0, 4), [MIXED[0], MIXED[1], MIXED[4]]
    k, v = torch.randn(2, 3, n + 5, 8), torch.randn(2, 3, n + 5, 4)
    kept = Kept.of(row, 3, CAPACITY)
    store, past = RaggedStore(kept, kept.index(torch.device("cpu"), 4), k, v), 0
    for piece in pieces:
        if piece > 0 or past < max(pads):
            store.fill(k[:, :, past : past + abs(piece)], v[:, :, past : past + abs(piece)], pads, past)
        else:
            for at in range(past, past - piece):
                store.step(torch.randn(2, 3, 1, 8), k[:, :, at : at + 1], v[:, :, at : at + 1], 1.0)
        past += abs(piece)
    keys, values = store.text(k[:, :, n:], v[:, :, n:], pads, n)
    assert keys.shape == (2, 3, n + 5, 8)
    rows = torch.arange(n, n + 5)
    for b, pad in enumerate(pads):
        for h, pattern in enumerate(row):
            read = pattern.keep((rows - pad)[:, None], torch.arange(n + 5 - pad)[None]).any(0)
            assert torch.equal(keys[b, h, pad:][read], k[b, h, pad:][read])
            assert torch.equal(values[b, h, pad:][read], v[b, h, pad:][read])


def test_memory_is_the_sum_over_heads():
    row = [sink(2) | window(9), columns(3, 50, 90) | window(4), diagonals(0, 30), window(5), dense(), columns(1, 2)]
    kept = Kept.of(row, 3, 100)
    # Columns of both heads and the farthest distance; with dense() all positions once.
    assert [head.slots for head in kept.heads] == [2 + 3 + 9, 31, 100]
    store = RaggedStore(kept, kept.index(torch.device("cpu"), 4), torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, 8))
    assert store.nbytes == 2 * (14 + 31 + 100) * (16 + 8) * 4 + 2 * 3 * 2 * 4
    assert kept.share == (14 + 31 + 100) / 300


def test_copies_and_selected_rows_go_their_own_way():
    store, _ = run(MIXED, 2, [30, -2], pads=(0, 5))
    before = [tensor.clone() for tensor in store.memory]
    q, k, v = torch.randn(2, 6, 1, 16).half(), torch.randn(2, 2, 1, 16).half(), torch.randn(2, 2, 1, 8).half()
    swapped = torch.tensor([1, 0])
    other, branch = store.select(swapped), copy.deepcopy(store)
    out, _ = other.step(q[swapped], k[swapped], v[swapped], 0.4)
    again, _ = branch.step(q, k, v, 0.4)
    assert all(torch.equal(now, then) for now, then in zip(store.memory, before, strict=True))
    torch.testing.assert_close(out[swapped], again)
    assert branch.index is store.index


def test_refusals_name_the_reason(monkeypatch):
    for pattern, reason in [(random_blocks(1, block=4), "may read any earlier key"), (top_blocks(2), "from the input")]:
        with pytest.raises(UserError, match=reason):
            Kept.of([pattern], 1, 64)
    with pytest.raises(UserError, match="room for at least one"):
        Kept.of([dense()], 1, 0)
    store, _ = run([window(4)], 1, [5], dtype=torch.float64)
    q, k, v = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 8).double()
    with pytest.raises(UserError, match=r"in torch\.float32 on cpu"):
        store.step(q.float(), k.float(), v.float(), 1.0)
    with pytest.raises(UserError, match="unknown backend 'fa4'"):
        store.step(q, k, v, 1.0, "fa4")
    with pytest.raises(UserError, match="backend 'triton' cannot serve"):
        store.step(q, k, v, 1.0, "triton")
    monkeypatch.setattr(Window, "end", lambda self, n: 2 * torch.arange(n) + 1)
    with pytest.raises(UserError, match=r"window\(4\) keeps some keys longer than others"):
        Kept.of([window(4)], 1, 64)


PROGRAM = """
import torch
from attnsieve.backends.triton import ragged
from attnsieve.patterns import columns, window
from attnsieve.ragged import Kept, RaggedStore

kept = Kept.of([window(9), columns(20)] * {group}, 2, 300)
k = torch.zeros(1, 2, 1, {width}, dtype={dtype})
store = RaggedStore(kept, kept.index(torch.device("cpu"), 8), k, k)
q = k.repeat_interleave({group}, 1)
ragged.Step(q, store.memory, store.index, 0.1)(q, k, k)
"""


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize(("dtype", "width", "group"), [("torch.bfloat16", 128, 4), ("torch.float32", 80, 1)])
def test_kernels_compile_for_a_gpu(dtype, width, group):
    names = compiled(PROGRAM.format(dtype=dtype, width=width, group=group))
    assert names == ["append_kernel", "attend_kernel", "combine_kernel"]


def test_steps_refuse_what_does_not_fit_and_copies_take_them_anew():
    kept = Kept.of([window(5)] * 4, 2, 64)
    q, k, v = (torch.randn(1, heads, 1, 16) for heads in (4, 2, 2))
    store = RaggedStore(kept, kept.index(q.device, 8), k, v)
    store.step(q, k, v, 0.25)
    two = [torch.cat([x, x], 2) for x in (k, v)]
    for wrong in ((q[:, :3], k, v), (q.double(), k, v), (q[..., :8], k, v), (q.expand(2, -1, -1, -1), k, v), (q, *two)):
        with pytest.raises(UserError, match="a step takes one token"):
            store.step(*wrong, 0.25)
    with pytest.raises(UserError, match="scale must be a finite number in float32, got nan"):
        store.step(q, k, v, torch.nan)
    again = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(again.step(q, k, v, 0.25), store.step(q, k, v, 0.25))
