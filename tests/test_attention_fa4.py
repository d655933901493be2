"""What the FA4 backend asks of flash_attn.cute, answered by a stand-in in torch: lists, windows, chunks, groups and predicates.

The kernels themselves need a GPU (tests/gpu/test_fa4.py). The stand-in reads block lists and calls predicates as they do.
"""

import sys
from collections import namedtuple
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from attnsieve import Spans, UserError, attend, compile_layout
from attnsieve.backends import fa4
from attnsieve.backends.call import Call
from attnsieve.backends.fa4 import columns as fa4_columns
from attnsieve.backends.fa4 import kernel
from attnsieve.backends.fa4.lists import lists_of_rule
from attnsieve.backends.reference import masked_softmax_matmul
from attnsieve.bench.masks import columns_and_window
from attnsieve.patterns import columns, dense, diagonals, random_blocks, sink, window
from attnsieve.testing import assert_within_budget
from tests.gpu_compiler import compiled
from tests.interpreter import needs_interpreter

Lists = namedtuple("Lists", "part_count part whole_count whole block_size")
N = 600
HEADS = {
    "dense": [dense()] * 4,
    "window": [window(100)] * 4,
    "narrow window": [window(1)] * 4,
    "sink and windows": [sink(3) | window(70), window(200), sink(130) | window(1), window(9)],
    "empty rows": [columns(300)] * 4,
    "diagonals": [diagonals(*range(0, 400, 3)), window(40) | diagonals(0, 200), diagonals(129), window(5)],
    "blocks": [random_blocks(1, block=128), random_blocks(2, block=128, seed=1)] * 2,
    "wide blocks": [random_blocks(1, block=256)] * 4,
    "shared by groups": [sink(3) | window(70), window(200)],
    "columns shared by groups": [columns(*range(5, 590, 9)) | window(70), columns(*range(0, 600, 7)) | sink(200) | window(1)],
    "columns alone": [columns(*range(3, 590, 9)), columns(*range(0, 600, 11))],
    "columns of each head": [columns(*range(h, 590, 9 + h)) | window(70 * h + 1) for h in range(4)],
    "half of the columns": [columns(*range(h, 600, 2)) | window(200) for h in (0, 1, 0, 1)],
    "blocks shared by groups": [random_blocks(1, block=128), random_blocks(2, block=128, seed=1)],
}
# Layouts for which lists are found by the Triton backend's schedule.
BY_SCHEDULE = set(HEADS) - {"dense", "window", "narrow window", "blocks", "wide blocks", "blocks shared by groups"}


def forward(q, k, v, *, softmax_scale, return_lse, causal=False, window_size_left=None, window_size_right=None, **lists):
    """_flash_attn_fwd on [B, T, H, D] with the mask of its arguments: causality and windows end at the last key."""
    assert return_lse
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    i, j = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])[None, :]
    mask = torch.ones(q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
    if causal or window_size_right == 0:
        mask &= j <= i
    if window_size_left is not None:
        mask &= i - j <= window_size_left
    if lists.get("block_sparse_tensors") is not None:
        mask &= of_lists(lists, *mask.shape)
    out, lse = masked_softmax_matmul(q @ k.mT * softmax_scale, mask, v)
    return out.transpose(1, 2), lse, None, None, None


def of_lists(arguments, heads, queries, keys):
    lists, keep = arguments["block_sparse_tensors"], arguments.get("mask_mod")
    tile = lists.block_size[0]
    assert lists.part_count.shape == (1, heads, -(-queries // tile)), "one count for every query head and tile"
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in lists[:4])
    assert max(lists.part.shape[-1], lists.whole.shape[-1]) <= -(-keys // tile)
    mask = torch.zeros(heads, queries + tile, keys + tile, dtype=torch.bool)
    sizes = SimpleNamespace(seqlen_q=queries, seqlen_k=keys)
    for h in range(heads):
        for t in range(lists.part_count.shape[-1]):
            rows = slice(t * tile, (t + 1) * tile)
            for b in lists.whole[0, h, t, : lists.whole_count[0, h, t]].tolist():
                mask[h, rows, b * tile : (b + 1) * tile] = True
            for b in lists.part[0, h, t, : lists.part_count[0, h, t]].tolist():
                i, j = torch.arange(tile)[:, None] + t * tile, torch.arange(tile)[None, :] + b * tile
                kept = torch.ones(tile, tile, dtype=torch.bool)
                mask[h, rows, b * tile : (b + 1) * tile] = (
                    kept if keep is None else keep(h, i, j, sizes, arguments["aux_tensors"])
                )
    return mask[:, :queries, :keys]


def keep_by_rows(head, query, key, sizes, vectors):
    since, number = since_and_number(head, query, key, sizes, vectors)
    return (since >= 0) & (since < number)


def keep_by_rows_or_offset(head, query, key, sizes, vectors):
    since, number = since_and_number(head, query, key, sizes, vectors)
    return (since >= 0) & ((since < number) | (vectors[1][head, since.clamp_min(0)] > 0))


def since_and_number(head, query, key, sizes, vectors):
    rows = vectors[0][head, key]
    return query + sizes.seqlen_k - sizes.seqlen_q - (rows & (2**32 - 1)), rows >> 32


@pytest.fixture
def stand_in(monkeypatch):
    modules = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"_flash_attn_fwd": forward},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Lists},
        "attnsieve.backends.fa4.keep": {
            "keep_by_rows": keep_by_rows,
            "keep_by_rows_or_offset": keep_by_rows_or_offset,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa4, "keep", sys.modules["attnsieve.backends.fa4.keep"], raising=False)
    monkeypatch.setattr(fa4, "_why_not_here", lambda call: None)
    monkeypatch.setattr(fa4, "_DTYPES", (torch.float32,))


def make(patterns, q_len=N, n=N, batch=2, capacity=700):
    q = torch.randn(batch, 4, q_len, 16)
    k, v = (torch.randn(batch, 2, n, 16) for _ in range(2))
    return Call(q, k, v, compile_layout(patterns, capacity), Spans.full(batch, q_len, n), 0.3)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("q_len", "n"), [(N, N), (N - 384, N), (130, 130), (5, 5), (44, 300)])
def test_equals_the_oracle(name, q_len, n, stand_in):
    if name in BY_SCHEDULE and find_spec("triton") is None:
        pytest.skip("needs Triton's interpreter")
    call = make(HEADS[name], q_len, n)
    assert fa4.why_not(call) is None
    assert_within_budget(*fa4.run(call), call)


@needs_interpreter
@pytest.mark.parametrize("name", [name for name in HEADS if "columns" in name])
@pytest.mark.parametrize(("q_len", "n"), [(N, N), (N - 384, N), (44, 300)])
def test_moved_columns_equal_the_oracle(name, q_len, n, stand_in, monkeypatch):
    """Also where moving costs more than it spares, as it does for texts this short."""
    monkeypatch.setattr(fa4_columns, "_COPY", 0)
    call = make(HEADS[name], q_len, n)
    assert kernel.built(call).columns is not None
    assert_within_budget(*fa4.run(call), call)


@needs_interpreter
@pytest.mark.parametrize("n", [320, 300])
def test_tiles_are_counted_as_they_are_listed(n):
    patterns = [*HEADS["sink and windows"], OTHERS, columns(290), dense()]
    layout = compile_layout(patterns, n)
    lists = lists_of_rule(layout, 32)
    whole, partial = fa4_columns._work(layout.end[0], 32)
    assert (int(whole), int(partial)) == (int(lists.whole_count.sum()), int(lists.part_count.sum()))


@needs_interpreter
def test_keys_are_copied_in_front():
    from attnsieve.backends.fa4.copies import KeysInFront

    x = torch.randn(2, 70, 3, 24, dtype=torch.float64).transpose(1, 2)
    index = torch.randint(0, 90, (3, 40), dtype=torch.int32)
    got = KeysInFront(x.shape, index)(x)
    assert torch.equal(got[:, :, 40:], x)
    for head in range(3):
        assert torch.equal(got[:, head, :40], x[:, head, index[head].clamp_max(69).long()])


def test_the_copy_compiles_for_a_gpu():
    pytest.importorskip("triton")
    copy = "from attnsieve.backends.fa4.copies import KeysInFront"
    x = "torch.zeros(1, 2, 300, 80, dtype=torch.bfloat16)"
    call = f"KeysInFront((1, 2, 300, 80), torch.zeros(2, 128, dtype=torch.int32))({x})"
    assert compiled(f"import torch\n{copy}\n{call}") == ["_copy_kernel"]


SCATTERED = columns(*range(5, 590, 9)) | window(70)
OTHERS = columns(*range(0, 300, 7)) | sink(200) | window(1)


def visited(lists):
    """int [Hq, T]: key tiles of each query tile."""
    return (lists.part_count + lists.whole_count)[0]


@needs_interpreter
def test_moved_columns_spare_tiles(monkeypatch):
    monkeypatch.setattr(fa4_columns, "_COPY", 0)
    call = make([SCATTERED] * 2)
    mask, plain = kernel.built(call), lists_of_rule(call.layout, fa4.TILE).per_query_head(4)
    assert mask.columns.shape == (2, 128)
    # Window tiles, the own tile and one tile of columns: at most 3 of a row of 5.
    assert int(visited(mask.lists)[0, 4]) == 3 < int(visited(plain)[0, 4])
    # In a wide window the tiles between its ends stay whole: columns leave them when the window does.
    wide = kernel.built(make([columns(*range(5, 590, 9)) | window(400)] * 2)).lists
    assert wide.whole[0, 0, 4, : wide.whole_count[0, 0, 4]].tolist() == [1 + 2, 1 + 3]


@needs_interpreter
def test_query_heads_with_masks_of_their_own_read_their_own_stretch(monkeypatch):
    monkeypatch.setattr(fa4_columns, "_COPY", 0)
    mask = kernel.built(make([SCATTERED, columns(*range(0, 600, 7)) | window(1)] * 2))
    assert mask.columns.shape == (2, 256), "two stretches of a tile for each KV head"
    for h in range(4):
        tiles = mask.lists.part[0, h, 4, : mask.lists.part_count[0, h, 4]].tolist()
        assert [tile for tile in tiles if tile < 2] == [h % 2]


@needs_interpreter
def test_half_of_the_columns_are_moved_by_themselves():
    """Random ones of each query head: nearly the tiles of a dense mask, half of them after."""
    layout = columns_and_window(512, 2, "cpu", 256, 20)
    moved, plain = fa4_columns.move_columns(layout, 2, 1, 16), lists_of_rule(layout, 16)
    assert visited(plain).sum() > 0.97 * 2 * 32 * 33 / 2
    assert visited(moved.lists).sum() < 0.68 * visited(plain).sum()
    assert moved.index.shape == (1, 2 * 256)


@pytest.mark.parametrize(
    "patterns", [[sink(4) | window(70)] * 2, [columns(9)] * 4, [dense()] * 4, [columns(*range(128, 384))] * 4]
)
@needs_interpreter
def test_columns_stay_where_moving_them_spares_too_little(patterns):
    assert kernel.built(make(patterns)).columns is None


def test_what_it_cannot_serve_is_refused_by_name(stand_in):
    assert "multiple of 128" in fa4.why_not(make(HEADS["blocks"], 100, N))
    assert "multiple of 128" in fa4.why_not(make([random_blocks(1, block=64)] * 4))
    assert "multiple of 128" in fa4.why_not(make([random_blocks(1, block=128) | window(9)] * 4))
    call = make(HEADS["dense"])
    with pytest.raises(UserError, match="gradients"):
        attend(call.q.requires_grad_(), call.k, call.v, call.layout, backend="fa4")


def test_without_a_gpu_or_the_package_it_says_so():
    assert "CUDA" in fa4.why_not(make(HEADS["dense"]))
