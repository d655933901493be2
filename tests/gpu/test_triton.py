"""The Triton backend on a GPU against the float64 oracle: every pattern, head width, dtype, group and span shape."""

import pytest
import torch

from attnsieve import Spans, attend, compile_layout
from attnsieve.backends.call import Call
from attnsieve.backends.triton import why_not
from attnsieve.patterns import columns, diagonals, empty, sink, window
from attnsieve.testing import assert_within_budget
from tests.laws.samples import SAMPLES, dam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIXED = [sink(2) | window(9), dam(20, (0, 7), (0, 1, 6)), diagonals(0, 40, 90), empty()]


def check(layout, *, batch=1, group=2, kv_heads=1, q_len=None, n=517, width=64, v_width=None, dtype=torch.bfloat16, spans=None):
    q_len = n if q_len is None else q_len
    make = lambda heads, length, d: torch.randn(batch, heads, length, d, device="cuda", dtype=dtype)  # noqa: E731
    q, k, v = make(kv_heads * group, q_len, width), make(kv_heads, n, width), make(kv_heads, n, v_width or width)
    bias = torch.randn(batch, kv_heads, n, device="cuda")
    spans = Spans.full(batch, q_len, n, "cuda") if spans is None else spans
    call = Call(q, k, v, layout.to("cuda"), spans, width**-0.5, bias)
    if why_not(call):
        pytest.skip(why_not(call))
    poison()
    out, lse = attend(q, k, v, call.layout, spans=spans, key_bias=bias, backend="triton", return_lse=True)
    assert_within_budget(out, lse, call)


def poison():
    """Fill the allocator's free blocks with NaN, so that an unwritten output shows."""
    blocks = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    del blocks


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pattern", SAMPLES, ids=lambda pattern: str(pattern)[:40])
def test_patterns(pattern, heads):
    check(compile_layout([pattern] * heads, 600))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
def test_widths(width, dtype):
    check(compile_layout([dam(33, (0, 100), (0, 1, 70)) | window(90)], 600), width=width, dtype=dtype)


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
