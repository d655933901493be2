"""FlashAttention-4 and torch's dense kernels on a GPU against the float64 oracle; what they cannot serve is refused by name."""

from dataclasses import replace

import pytest
import torch

from attnsieve import Spans, UserError, attend, compile_layout
from attnsieve.backends import dense as dense_backend
from attnsieve.backends import fa4
from attnsieve.backends.call import Call
from attnsieve.backends.fa4 import columns as fa4_columns
from attnsieve.backends.fa4 import kernel
from attnsieve.bench.masks import mask
from attnsieve.patterns import columns, dense, diagonals, random_blocks, sink, vertical_slash, window
from attnsieve.selection import choose
from attnsieve.testing import assert_within_budget
from tests.gpu.test_triton import poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_fa4 = pytest.mark.skipif(not fa4.installed(), reason="needs flash-attn-4")


def make(layout, *, q_len=None, n=517, group=2, kv_heads=2, width=128, dtype=torch.bfloat16, batch=1, spans=None, bias=None):
    q_len = n if q_len is None else q_len
    draw = lambda heads, length: torch.randn(batch, heads, length, width, device="cuda", dtype=dtype)  # noqa: E731
    spans = Spans.full(batch, q_len, n, "cuda") if spans is None else spans
    q, k, v = draw(kv_heads * group, q_len), draw(kv_heads, n), draw(kv_heads, n)
    return Call(q, k, v, layout.to("cuda"), spans, width**-0.5, bias)


def check(call, backend):
    poison()
    rest = {"spans": call.spans, "backend": backend, "return_lse": True}
    assert_within_budget(*attend(call.q, call.k, call.v, call.layout, **rest), call)


HEADS = {
    "dense": [dense()] * 4,
    "window": [window(100)] * 4,
    "narrow window": [window(1)] * 4,
    "sink and windows": [sink(3) | window(70), window(200), sink(130) | window(1), window(9)],
    "columns": [columns(*range(0, 500, 7)) | window(64)] * 4,
    "empty rows": [columns(300)] * 4,
    "diagonals": [diagonals(*range(0, 400, 3)), window(40) | diagonals(0, 200), diagonals(129), window(5)],
    "blocks": [random_blocks(1, block=128), random_blocks(2, block=128, seed=1)] * 2,
    "wide blocks": [random_blocks(1, block=256)] * 4,
}


# Every kind of mask, width, dtype and group is a kernel of its own, which takes seconds to compile.
@needs_fa4
@pytest.mark.parametrize("name", HEADS)
def test_fa4_equals_the_oracle(name):
    check(make(compile_layout(HEADS[name], 700)), "fa4")


@needs_fa4
@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (80, torch.bfloat16), (128, torch.float16)])
def test_fa4_widths_and_dtypes(width, dtype):
    check(make(compile_layout(HEADS["sink and windows"], 517), width=width, dtype=dtype), "fa4")


@needs_fa4
@pytest.mark.parametrize("name", ["dense", "window", "sink and windows", "blocks"])
@pytest.mark.parametrize(("q_len", "n"), [(517 - 384, 517), (256, 512), (1, 1), (128, 128), (129, 129), (1025, 1025)])
def test_fa4_chunks_and_lengths(name, q_len, n):
    check(make(compile_layout(HEADS[name], 1100), q_len=q_len, n=n), "fa4")


@needs_fa4
@pytest.mark.parametrize("group", [1, 7])
def test_fa4_groups_batches_and_shared_masks(group):
    for heads in (2, 2 * group):
        check(make(compile_layout([sink(3) | window(70), window(200)] * (heads // 2), 517), group=group, batch=2), "fa4")
        check(make(compile_layout([HEADS["blocks"][h % 2] for h in range(heads)], 517), group=group, batch=2), "fa4")


COLUMNS = {
    "shared by groups": [columns(*range(5, 640, 9)) | window(70), columns(*range(0, 640, 7)) | sink(128) | window(1)],
    "of each head": [columns(*range(h, 640, 7 + h)) | window(60 * h + 1) for h in range(4)],
    "half": [columns(*range(h, 640, 2)) | window(200) for h in (0, 1, 1, 0)],
}


@needs_fa4
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("q_len", "n"), [(517, 517), (133, 517), (645, 645)])
def test_fa4_moves_columns_in_front(name, q_len, n, monkeypatch):
    """Also where moving costs more than it spares, as it does for texts this short."""
    monkeypatch.setattr(fa4_columns, "_COPY", 0)
    call = make(compile_layout(COLUMNS[name], 700), q_len=q_len, n=n, batch=2)
    assert kernel.built(call).columns is not None
    check(call, "fa4")


@needs_fa4
@pytest.mark.parametrize("width", [64, 80])
def test_fa4_moves_columns_of_narrow_heads(width, monkeypatch):
    monkeypatch.setattr(fa4_columns, "_COPY", 0)
    check(make(compile_layout(COLUMNS["of each head"], 700), width=width), "fa4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 128])
def test_keys_are_copied_in_front(width, dtype):
    from attnsieve.backends.fa4.copies import KeysInFront

    x = torch.randn(2, 517, 3, width, device="cuda", dtype=dtype).transpose(1, 2)
    index = torch.randint(0, 600, (3, 256), dtype=torch.int32, device="cuda")
    listed = index.clamp_max(516).long()[None, :, :, None].expand(2, -1, -1, width)
    assert torch.equal(KeysInFront(x.shape, index)(x), torch.cat([x.gather(2, listed), x], dim=2))


@needs_fa4
@pytest.mark.parametrize("name", ["blocks-25", "blocks-10", "B", "C", "columns-50"])
def test_fa4_on_the_masks_that_are_measured(name):
    call = make(mask(name, 2048, 4, "cuda"), n=2048, width=128)
    assert (kernel.built(call).columns is not None) == (name == "columns-50")
    check(call, "fa4")


@needs_fa4
@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("width", {"width": 256}),
        ("float16 and bfloat16", {"dtype": torch.float32}),
        ("padding", {"spans": Spans.of([(0, 0, 100, 0, 100)], "cuda") if torch.cuda.is_available() else None}),
        ("multiple of 128", {"q_len": 100}),
        ("bias", {"bias": torch.zeros(1, 2, 517)}),
    ],
)
def test_fa4_refuses_by_name(named, change):
    assert named in fa4.why_not(make(compile_layout(HEADS["sink and windows"], 517), **change))


@needs_fa4
def test_fa4_refuses_gradients_corners_and_choices():
    call = make(compile_layout([dense()] * 4, 517))
    with pytest.raises(UserError, match="gradients"):
        attend(call.q.requires_grad_(), call.k, call.v, call.layout, backend="fa4")
    from tests.laws.samples import dam

    assert "corner" in fa4.why_not(make(compile_layout([dam(20, (0, 7), (0, 1, 6))] * 4, 517)))
    call = make(compile_layout([dense()] * 4, 517))
    assert "chosen" in fa4.why_not(make(choose([vertical_slash(mass=0.5)] * 4, call.q, call.k)))
    odd = make(compile_layout([random_blocks(1, block=64)] * 4, 517))
    assert "multiple of 128" in fa4.why_not(odd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize(("q_len", "n"), [(517, 517), (1, 517), (100, 517), (9, 517)])
def test_dense_equals_the_oracle(q_len, n, width, dtype):
    call = make(compile_layout([dense()], 600), q_len=q_len, n=n, width=width, dtype=dtype, batch=2, kv_heads=1, group=4)
    assert dense_backend.why_not(call) is None
    check(call, "dense")


@pytest.mark.parametrize("q_len", [517, 1])
@pytest.mark.parametrize("backend", ["dense", pytest.param("fa4", marks=needs_fa4)])
def test_memory_may_be_laid_out_in_another_way(backend, q_len):
    def turns(x):
        yield x.mT.contiguous().mT
        # An address and strides that are no multiples of 16 bytes.
        yield torch.cat([x, x[..., :1]], -1)[..., 1:]
        yield x[:, :, :1].expand_as(x)

    call = make(compile_layout([dense()] * 4, 517), q_len=q_len)
    for q, k, v in zip(*map(turns, (call.q, call.k, call.v)), strict=True):
        check(replace(call, q=q, k=k, v=v), backend)
