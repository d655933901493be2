"""Choosing keys on a GPU: what a CPU chooses, without waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attnsieve import Spans, attend
from attnsieve.patterns import antidiagonal_blocks, probed_blocks, probed_keys, vertical_slash
from attnsieve.selection import choose, fused
from attnsieve.selection.probe import probe_rows
from attnsieve.selection.sequence import SequenceQK
from attnsieve.testing import relative_error
from tests.selection_samples import SAMPLES, VOTING, random_qk, shared

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where an operation waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", [*SAMPLES, *map(shared, VOTING)], ids=str)
def test_a_gpu_chooses_what_a_cpu_chooses(pattern):
    n = 300
    q, k = random_qk(2, 8, 2, n)
    rows = torch.arange(n)
    expected = choose([pattern] * 8, q, k).dense(rows, rows)
    layout = choose([pattern] * 8, q.cuda(), k.cuda())
    found = layout.dense(rows.cuda(), rows.cuda()).cpu()
    # Sums are rounded in another order, so that close calls may go either way.
    assert float((found != expected).float().mean()) < 2e-3


@pytest.mark.parametrize("n", [300, 5000])
def test_heads_with_masses_of_their_own_choose_on_a_gpu_what_they_choose_alone(n):
    """Of rows in registers and in memory."""
    q, k = (tensor.cuda() for tensor in random_qk(1, 4, 2, n, width=64))
    for rule in (vertical_slash, probed_keys, probed_blocks):
        row = [rule(mass=mass) for mass in (0.3, 0.9, 0.6, 0.6)]
        together, rows = choose(row, q, k), torch.arange(n - 50, n, device="cuda")
        for head, pattern in enumerate(row):
            alone = choose([pattern] * 4, q, k)
            assert torch.equal(together.dense(rows, rows)[:, head], alone.dense(rows, rows)[:, head])


@pytest.mark.parametrize("pattern", [*SAMPLES, *map(shared, VOTING)], ids=str)
def test_choosing_never_waits(pattern):
    if "probed_keys" in str(pattern):
        pytest.skip("the longest list of single keys is read back")
    q, k = (tensor.cuda() for tensor in random_qk(2, 8, 2, 300))
    for queries in (q, q[:, :, -1:]):
        spans = Spans.full(2, queries.shape[2], 300, "cuda")
        choose([pattern] * 8, queries, k, spans=spans)
        with no_waiting():
            choose([pattern] * 8, queries, k, spans=spans)


@pytest.mark.parametrize("pattern", [shared(pattern) for pattern in VOTING], ids=str)
def test_masks_of_a_group_serve_all_its_heads(pattern):
    n = 300
    q, k = (tensor.cuda() for tensor in random_qk(1, 8, 2, n, width=64))
    v = torch.randn_like(k)
    layout = choose([pattern] * 8, q, k)
    assert layout.heads == 2
    exact = attend(q.double(), k.double(), v.double(), layout, backend="reference")
    assert relative_error(attend(q, k, v, layout), exact) < 1e-3


def long_inputs(n, group=4, width=128, dtype=torch.bfloat16):
    """Scores with a standard deviation of 3."""
    q, k = random_qk(1, group, 1, n, width=width, scale=3.0)
    return q.to("cuda", dtype), k.to("cuda", dtype)


def double_attention(sequence, rows):
    """float64 [1, G, R, n]."""
    q, k = sequence.q[:, :, rows - sequence.first_row].double(), sequence.k.double()
    late = torch.arange(sequence.tokens, device=rows.device) > rows[:, None]
    return (q @ k.mT * sequence.scale).masked_fill(late, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("group", "width", "dtype"),
    [(4, 128, torch.bfloat16), (7, 80, torch.bfloat16), (3, 256, torch.float16), (1, 64, torch.float32)],
)
def test_masses_are_those_of_float64(group, width, dtype):
    from attnsieve.selection.fused.masses import Sums, by_block, by_key
    from attnsieve.selection.fused.rows import ProbedRows
    from attnsieve.selection.fused.slash import Cells

    n, count = 9001, 96
    q, k = long_inputs(n, group, width, dtype)
    for together in (False, True):
        sequence = SequenceQK(q, k, width**-0.5, together)
        rows = torch.arange(n - count, n, device="cuda")
        cells = double_attention(sequence, rows)
        cells = cells.sum(1, keepdim=True) if together else cells
        probed = ProbedRows.of(sequence, rows)
        expected = cells.unflatten(2, (-1, 4)).sum(3)
        read = torch.arange(n, device="cuda") <= rows[3::4, None]
        assert relative_error(by_key(probed, k, Sums(4, together))[..., read], expected[..., read]) < 3e-5
        blocks = torch.nn.functional.pad(expected, (0, -n % 64)).unflatten(-1, (-1, 64)).sum(-1)
        assert relative_error(by_block(probed, k, 64, Sums(4, together)), blocks) < 3e-5
        by_key_found, by_distance_found = Cells.of(sequence, rows).sums(count)
        distance = (rows[:, None] - torch.arange(n, device="cuda")).clamp_min(0).flatten().expand(*cells.shape[:2], -1)
        by_distance = torch.zeros_like(cells[:, :, 0]).scatter_add_(-1, distance, cells.flatten(2))
        assert relative_error(by_key_found, cells.sum(2)) < 3e-5
        assert relative_error(by_distance_found.flip(-1), by_distance) < 3e-5


@pytest.mark.parametrize(
    "pattern",
    [
        vertical_slash(mass=0.9),
        vertical_slash(mass=0.9, strided=16),
        probed_keys(mass=0.9, block=128, rows=4),
        probed_blocks(mass=0.7),
        antidiagonal_blocks(mass=0.7, block=128),
    ],
    ids=str,
)
def test_kernels_choose_what_plain_torch_chooses(pattern, monkeypatch):
    n = 5000
    rows = torch.arange(n, device="cuda")
    for rule in (pattern, shared(pattern)):
        q, k = long_inputs(n, 2)
        found = choose([rule] * 2, q, k).dense(rows, rows)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "serves", lambda x: False)
            expected = choose([rule] * 2, q, k).dense(rows, rows)
        assert float(expected.float().mean()) < 0.4
        assert float((found != expected).float().mean()) < 1e-3


def test_the_mass_asked_for_is_kept_at_length():
    n, mass = 40000, 0.9
    q, k = long_inputs(n)
    sequence = SequenceQK(q, k, 128**-0.5)
    layout = choose([vertical_slash(mass=mass)] * 4, q, k)
    rows = probe_rows(sequence, 64)
    kept = layout.dense(rows, torch.arange(n, device="cuda"))
    attention = double_attention(sequence, rows)
    assert ((attention * kept).sum((2, 3)) >= (mass - 1e-4) * 64).all()


@pytest.mark.parametrize("width", [300, 8192, 8193, 70000, 262144])
def test_the_search_keeps_what_sorting_keeps(width, monkeypatch):
    from attnsieve.selection.sequence import fewest_with_mass

    for weights in (torch.randn(6, width, device="cuda").mul(3).exp(), torch.ones(6, width, device="cuda")):
        found = fewest_with_mass(weights, 0.9)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "serves", lambda x: False)
            expected = fewest_with_mass(weights.double(), 0.9)
        # float32 sums may end one of many small entries earlier or later.
        assert int((found != expected).sum(-1).max()) <= max(2, width // 10000)
