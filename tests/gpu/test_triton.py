"""The Triton backend on a GPU against the float64 oracle: every pattern, head width, dtype, group and span shape."""

import pytest
import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends.call import Call
from attnsieve.backends.triton import why_not
from attnsieve.bench.check import check_gradients
from attnsieve.bench.masks import selected
from attnsieve.patterns import columns, dense, diagonals, empty, random_blocks, sink, window
from attnsieve.testing import assert_within_budget, relative_error
from tests.laws.samples import SAMPLES, dam

forward = pytest.importorskip("attnsieve.backends.triton.forward", exc_type=ImportError).forward
Tiles = pytest.importorskip("attnsieve.backends.triton.geometry", exc_type=ImportError).Tiles
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIXED = [sink(2) | window(9), dam(20, (0, 7), (0, 1, 6)), diagonals(0, 40, 90), empty()]


def call_of(
    layout, *, batch=1, group=2, kv_heads=1, q_len=None, n=517, width=64, v_width=None, dtype=torch.bfloat16, spans=None
):
    q_len = n if q_len is None else q_len
    make = lambda heads, length, d: torch.randn(batch, heads, length, d, device="cuda", dtype=dtype)  # noqa: E731
    q, k, v = make(kv_heads * group, q_len, width), make(kv_heads, n, width), make(kv_heads, n, v_width or width)
    bias = torch.randn(batch, kv_heads, n, device="cuda")
    spans = Spans.full(batch, q_len, n, "cuda") if spans is None else spans
    return Call(q, k, v, layout.to("cuda"), spans, width**-0.5, bias)


def check(layout, **shape):
    call = call_of(layout, **shape)
    if why_not(call):
        pytest.skip(why_not(call))
    poison()
    out, lse = attend(
        call.q, call.k, call.v, call.layout, spans=call.spans, key_bias=call.key_bias, backend="triton", return_lse=True
    )
    assert_within_budget(out, lse, call)


def poison():
    """Fill the allocator's free blocks with NaN, so that an unwritten output shows."""
    blocks = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    del blocks


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pattern", SAMPLES, ids=lambda pattern: str(pattern)[:40])
def test_patterns(pattern, heads):
    check(compile_layout([pattern] * heads, 600))


HALVES = [(width, dtype) for width in (64, 80, 96, 128, 256) for dtype in (torch.float16, torch.bfloat16)]


# float32 takes long to compile.
@pytest.mark.parametrize(
    ("width", "dtype"), [*HALVES, (16, torch.bfloat16), (80, torch.float32), (128, torch.float32)], ids=str
)
def test_widths(width, dtype):
    check(compile_layout([dam(33, (0, 100), (0, 1, 70)) | window(90)], 600), width=width, dtype=dtype)


BLOCKED = random_blocks(1, block=128) | diagonals(3, 40) | window(5)


@pytest.mark.parametrize("pattern", [BLOCKED, columns(0, 70, 129) | diagonals(0, 1, 131), dam(33, (0,), (2, 90))], ids=str)
@pytest.mark.parametrize(
    "tiles", [Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(128, 32, 4, 3)], ids=str
)
def test_tile_shapes(tiles, pattern):
    call = call_of(compile_layout([pattern] * 2, 600))
    assert_within_budget(*forward(call, tiles), call)


@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
def test_what_is_not_finite_reaches_only_rows_that_keep_its_key(where, value):
    n, j = 517, 140
    heads = [BLOCKED, window(9) | columns(140, 300), dam(20, (0, 140), (0, 1, 6)), diagonals(0, 100, 200)]
    call = call_of(compile_layout(heads, n), kv_heads=2)
    clean, _ = attend(call.q, call.k, call.v, call.layout, key_bias=call.key_bias, backend="triton", return_lse=True)
    (call.k if where == "k" else call.v)[:, :, j, 3] = value
    out, lse = attend(call.q, call.k, call.v, call.layout, key_bias=call.key_bias, backend="triton", return_lse=True)
    keeps = call.layout.dense(torch.arange(n, device="cuda"), torch.tensor([j], device="cuda"))[..., 0]
    assert 0 < int(keeps.sum()) < keeps.numel()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    assert torch.equal(lse.isnan(), keeps & (where == "k"))
    assert relative_error(out[~keeps], clean[~keeps].double()) < 2 * torch.finfo(out.dtype).eps


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_groups(group):
    check(compile_layout(MIXED[:2], 517), kv_heads=2, group=group)
    check(compile_layout([MIXED[h % 4] for h in range(2 * group)], 517), kv_heads=2, group=group, v_width=32)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129, 200, 1025])
def test_lengths(n):
    check(compile_layout([sink(1) | window(70) | columns(5, 64)], max(n, 10)), n=n)


@pytest.mark.parametrize("q_len", [1, 5, 64, 100, 516])
def test_chunks(q_len):
    check(compile_layout(MIXED, 640), batch=2, group=2, kv_heads=2, q_len=q_len)


def test_padding_and_packing():
    pads = torch.tensor([0, 37, 300, 516, 517], device="cuda")
    check(compile_layout(MIXED, 517), batch=5, group=2, kv_heads=2, spans=Spans.left_padded(pads, 517, 517))
    check(compile_layout(MIXED, 517), batch=1, group=2, kv_heads=2, spans=Spans.packed([100, 1, 300, 80], device="cuda"))


def gradients_of(layout, *, group=2, kv_heads=1, n=517, width=64, dtype=torch.bfloat16, bias=True):
    q = torch.randn(1, kv_heads * group, n, width, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, n, width, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    b = torch.randn(1, kv_heads, n, device="cuda", requires_grad=True) if bias else None
    call = Call(q, k, v, layout.to("cuda"), Spans.full(1, n, n, "cuda"), width**-0.5, b)
    poison()
    out = attend(q, k, v, call.layout, key_bias=b, backend="triton")
    d_out = torch.randn_like(out)
    leaves = [q, k, v, b] if bias else [q, k, v]
    grads = torch.autograd.grad(out, leaves, d_out)
    return call, d_out, (*grads, *[None] * (4 - len(grads)))


GRADIENT_PATTERNS = [SAMPLES[0], SAMPLES[3], SAMPLES[5], SAMPLES[8], SAMPLES[11], *SAMPLES[-2:]]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pattern", GRADIENT_PATTERNS, ids=lambda pattern: str(pattern)[:40])
def test_gradients(pattern, heads):
    check_gradients(*gradients_of(compile_layout([pattern] * heads, 600)))


@pytest.mark.parametrize(("width", "dtype"), [*HALVES, (64, torch.float32), (128, torch.float32)], ids=str)
def test_gradients_of_selected_keys(width, dtype):
    check_gradients(*gradients_of(selected(517, 2, "cuda", 100), group=4, kv_heads=2, width=width, dtype=dtype))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_gradients_of_selected_keys_of_groups(group, width):
    check_gradients(*gradients_of(selected(2100, 1, "cuda", 300), group=group, n=2100, width=width))


@pytest.mark.parametrize("group", [1, 7, 8])
def test_gradients_of_groups(group):
    check_gradients(*gradients_of(compile_layout([MIXED[1]] * group, 517), group=group, bias=False))


def test_deterministic_gradients_repeat_bit_for_bit():
    layout = selected(1025, 2, "cuda", 100)
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        call, d_out, first = gradients_of(layout, group=4, kv_heads=2, n=1025)
        check_gradients(call, d_out, first)
        torch.manual_seed(0)
        _, _, second = gradients_of(layout, group=4, kv_heads=2, n=1025)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_bias_equal_for_all_keys_has_no_gradient(dtype):
    n = 517
    _, _, (*_, gradient) = gradients_of(selected(n, 1, "cuda", 60), n=n, dtype=dtype)
    assert gradient.sum().abs() < n * torch.finfo(torch.float32).eps * gradient.abs().sum()


def test_a_compiled_call_equals_an_eager_one():
    layout = compile_layout([columns(0, 200) | diagonals(0, 7) | window(30)] * 2, 600, "cuda")
    q, k, v = (torch.randn(1, 2, 517, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    run = lambda q, k, v: attend(2 * q, k, v, layout, backend="triton").float().sin().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True)
    for actual, expected in zip(*(torch.autograd.grad(f(q, k, v), [q, k, v]) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pattern", SAMPLES, ids=lambda pattern: str(pattern)[:40])
def test_decode(pattern, heads):
    check(compile_layout([pattern] * heads, 600), q_len=2, batch=2)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 7, 8, 32])
def test_decode_shapes(group, width):
    check(compile_layout([MIXED[1]] * 2, 5000), q_len=1, n=4097, group=group, kv_heads=2, width=width)


DECODED = [*MIXED, dense(), columns(3, 50, 90, 400) | diagonals(0, 40, 390), window(300) | columns(*range(0, 500, 9))]


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_decode_of_groups_with_masks_of_their_own(group, width):
    row = [DECODED[3 * h % len(DECODED)] for h in range(2 * group)]
    spans = Spans.left_padded(torch.tensor([0, 1, 300, 516, 517], device="cuda"), 2, 517)
    check(compile_layout(row, 600), batch=5, group=group, kv_heads=2, q_len=2, width=width, spans=spans)


@pytest.mark.parametrize("n", [1, 18, 33, 129, 5000])
def test_decode_of_few_and_many_keys(n):
    check(compile_layout(DECODED, 5000), q_len=1, n=n, kv_heads=1, group=len(DECODED))


@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
@pytest.mark.parametrize("v_width", [32, 64])
def test_decode_of_what_is_not_finite(where, value, v_width):
    layout = compile_layout([window(300), columns(5, 140), diagonals(0, 376), window(9)], 517)
    call = call_of(layout, q_len=1, kv_heads=2, v_width=v_width)
    run = lambda: attend(call.q, call.k, call.v, call.layout, key_bias=call.key_bias, backend="triton")  # noqa: E731
    clean = run()
    (call.k if where == "k" else call.v)[:, :, 140, 3] = value
    keeps = torch.tensor([False, True, True, False], device="cuda")[None, :, None]
    out = run()
    assert torch.equal(out.isfinite().all(-1), ~keeps)
    assert relative_error(out[~keeps], clean[~keeps].double()) < 2 * torch.finfo(out.dtype).eps


@pytest.mark.parametrize("row", [DECODED[:4], [columns(100, 200, 300) | window(30)]], ids=["own", "shared"])
def test_decode_replays_in_a_graph(row):
    n, layout = 600, compile_layout(row, 1024, "cuda")
    k, v = (torch.randn(1, 1, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    spans = Spans.of([(0, 0, 1, 0, n)], "cuda")
    attend(q, k, v, layout, spans=spans, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, layout, spans=spans, backend="triton", return_lse=True)
    for length in (n, n + 1, 1024, 5):
        spans.k_len.fill_(length)
        graph.replay()
        assert_within_budget(out, lse, Call(q, k, v, layout, spans, 64**-0.5))


def test_decode_does_not_wait_for_the_device():
    static, chosen = compile_layout(DECODED[:4], 1024, "cuda"), selected(1024, 1, "cuda", 100)
    call = call_of(static, q_len=1, group=4)
    run = lambda layout: attend(call.q, call.k, call.v, layout, spans=call.spans, backend="triton")  # noqa: E731
    run(static)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(static)
        run(chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
