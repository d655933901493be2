"""Dynamic atoms, one by one: what they choose on inputs whose answer is known."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import UserError
from attnsieve.patterns import (
    antidiagonal_blocks,
    dam_online,
    dense_decode,
    dense_prefill,
    heavy_hitters,
    last_queries,
    probed_blocks,
    probed_keys,
    top_blocks,
    vertical_slash,
    voted_keys,
    window,
)
from attnsieve.selection import blocks, choose, join
from attnsieve.selection.probe import LastRows, ScatteredRows, band_means, whole_bands
from tests.selection_samples import BLOCK, mask, random_qk


@given(st.floats(0.05, 1.0), st.integers(1, 20), st.integers(1, 9), st.integers(2, 90))
def test_vertical_slash_keeps_the_mass_of_its_probe(mass, probe, band, n):
    q, k = random_qk(1, 2, 1, n)
    kept = mask(vertical_slash(mass=mass, probe=probe, band=band), q, k)[0, :, -min(probe, n) :]
    rows = torch.arange(n)
    attention = (q[0] @ k[0].mT * 8**-0.5).masked_fill(rows > rows[:, None], -torch.inf).softmax(-1)[:, -min(probe, n) :]
    assert ((attention * kept).sum((1, 2)) >= (mass - 1e-4) * attention.sum((1, 2))).all()


def test_vertical_slash_finds_a_planted_column_and_offset():
    n, width = 96, 64
    key = torch.nn.functional.normalize(torch.randn(1, 1, n, width), dim=-1)
    query = 60 * torch.roll(key, 10, 2)
    column = mask(vertical_slash(mass=0.9, probe=16), 60 * key[:, :, 5:6].expand(1, 1, n, width).contiguous(), key)
    offset = mask(vertical_slash(mass=0.9, probe=16), query, key)
    rows = torch.arange(n)
    assert torch.equal(column[0, 0], (rows == 5).expand(n, n) & (rows <= rows[:, None]))
    assert torch.equal(offset[0, 0], rows[:, None] - rows == 10)


@pytest.mark.parametrize("n", [96, 90])
def test_bands_hold_whole_stretches_of_distances(n):
    """One planted offset keeps its band, of 16 distances or of those that there are."""
    key = torch.nn.functional.normalize(torch.randn(1, 1, n, 64), dim=-1)
    rows = torch.arange(n)
    for distance in (10, 85):
        query = 60 * torch.roll(key, distance, 2)
        kept = mask(vertical_slash(mass=0.9, probe=4, band=16), query, key)[0, 0]
        held = (rows[:, None] - rows) // 16 == distance // 16
        assert torch.equal(kept, held)


def test_bands_are_weighed_by_their_mean_and_the_last_by_what_it_has():
    values = torch.tensor([[4.0, 0, 0, 0, 1, 1, 1, 1, 3, 1]])
    assert band_means(values, 4).tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2]]
    assert whole_bands(values > 2, 4).tolist() == [[True] * 4 + [False] * 4 + [True] * 2]
    assert str(vertical_slash(mass=0.5, band=16)) == "vertical_slash(mass=0.5, probe=64, strided=0, band=16)"
    assert "band" not in str(vertical_slash(mass=0.5))


def test_dam_online_equals_the_hand_worked_case():
    """Every probe row puts its mass on key 3 and on itself: column 3 and the diagonal reach mu, nothing else."""
    n = 40
    key = torch.eye(n)[None, None]
    query = 50 * (torch.eye(n) + torch.eye(n)[3])[None, None]
    kept = mask(dam_online(tau=0.3, mu=1.0, probe=6), query, key)
    rows = torch.arange(n)
    assert torch.equal(kept[0, 0], ((rows == 3) | (rows == rows[:, None])) & (rows <= rows[:, None]))


@pytest.mark.parametrize(
    "pattern", [probed_blocks(mass=0.9, block=BLOCK, rows=4), antidiagonal_blocks(mass=0.9, block=BLOCK, stride=4)]
)
def test_block_selectors_find_the_block_that_holds_the_mass(pattern):
    n = 6 * BLOCK
    key = torch.zeros(1, 1, n, 4)
    key[:, :, 2 * BLOCK : 3 * BLOCK, 0] = 1.0
    query = torch.zeros(1, 1, n, 4)
    query[..., 0] = 40.0
    listed = choose([pattern], query, key).blocks
    assert listed.index[0, 0, 4:, 0].tolist() == [2, 2]
    assert listed.count[0, 0, 4:].tolist() == [1, 1]


@given(st.floats(0.05, 1.0), st.integers(1, 40), st.integers(2, 90))
def test_probed_keys_hold_the_mass_of_every_block_of_queries(mass, block, n):
    q, k = random_qk(1, 2, 1, n)
    layout = choose([probed_keys(mass=mass, block=block, rows=block)] * 2, q, k)
    rows = torch.arange(n)
    kept = layout.dense(rows, rows)[0]
    attention = (q[0] @ k[0].mT * 8**-0.5).masked_fill(rows > rows[:, None], -torch.inf).softmax(-1)
    for start in range(0, n, block):
        part = slice(start, start + block)
        assert ((attention * kept)[:, part].sum((1, 2)) >= (mass - 1e-4) * attention[:, part].sum((1, 2))).all()
        # One key fewer for the block of queries would hold less.
        weight = attention[:, part].sum(1).masked_fill(~kept[:, min(start + block, n) - 1], torch.inf)
        total = weight.masked_fill(weight.isinf(), 0).sum(-1)
        assert (total - weight.amin(-1) < mass * attention[:, part].sum((1, 2)) + 1e-4).all()
    assert layout.pairs(n).tolist() == kept.sum((1, 2))[None].tolist()


@pytest.mark.parametrize("sharp", [False, True], ids=["late rows keep most", "early rows keep most"])
@pytest.mark.parametrize("first", [0, 40])
def test_single_keys_are_flagged_for_some_blocks_of_queries_at_a_time(first, sharp, monkeypatch):
    """All flags would be the largest tensor of all; the lists are those of all flags at once."""
    q, k = random_qk(2, 4, 2, 130)
    q[:, :, 70:] *= 100 if sharp else 1
    pattern, at_once = probed_keys(mass=0.7, block=16, rows=3), []
    whole = choose([pattern] * 4, q[:, :, first:], k).blocks
    monkeypatch.setitem(blocks.CELLS_AT_ONCE, "cpu", 2 * 2 * 4 * 3 * 130)
    right = join._lists
    monkeypatch.setattr(join, "_lists", lambda table, *rest: at_once.append(table.shape[2]) or right(table, *rest))
    parts = choose([pattern] * 4, q[:, :, first:], k).blocks
    assert max(at_once) == 2
    assert sum(at_once) == -(-130 // 16) - first // 16
    assert torch.equal(parts.count, whole.count)
    assert torch.equal(parts.index, whole.index)
    assert (whole.count[:, :, -4:].amax() < whole.count.amax()) == sharp


def test_lists_that_memory_has_no_room_for_are_an_error_that_says_what_to_do(monkeypatch):
    def pad(*_args, **_options):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setitem(blocks.CELLS_AT_ONCE, "cpu", 1)
    monkeypatch.setattr(join, "F", SimpleNamespace(pad=pad))
    q, k = random_qk(1, 2, 1, 40)
    with pytest.raises(UserError, match=r"single keys for each of 3 blocks of queries, and .* GB .* keep less mass"):
        choose([probed_keys(mass=0.7, block=16, rows=2)] * 2, q, k)


def test_a_short_chunk_is_probed_by_all_its_queries():
    """Queries of a chunk within a block ask for keys that no other asks for: each is heard."""
    n, asked = 100, [3, 40, 7, 21]
    key = torch.eye(n)[None, None]
    query = 500 * torch.eye(n)[asked][None, None]
    kept = mask(probed_keys(mass=0.99, block=64, rows=4), query, key)[0, 0]
    assert kept.nonzero()[:, 1].unique().tolist() == sorted(asked)


def test_top_blocks_keeps_its_count():
    q, k = random_qk(1, 2, 1, 6 * BLOCK)
    assert choose([top_blocks(2, block=BLOCK)] * 2, q, k).blocks.count[0].tolist() == [[1, 2, 2, 2, 2, 2]] * 2


def test_heavy_hitters_equal_a_cache_that_evicts():
    """H2O step by step: attention among the keys that are left, sums, the losers of every block dropped."""
    n, count, recent, block = 61, 7, 5, 8
    q, k = random_qk(1, 1, 1, n)
    kept = mask(heavy_hitters(count, recent, block=block), q, k)[0, 0]
    alive, total = torch.ones(n, dtype=torch.bool), torch.zeros(n)
    for i in range(n):
        seen = alive & (torch.arange(n) <= i)
        assert torch.equal(kept[i], seen)
        total += (k[0, 0] @ q[0, 0, i] * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(0)
        if (i + 1) % block == 0:
            older = [j for j in range(n) if alive[j] and j <= i + 1 - recent]
            alive[sorted(older, key=lambda j: -total[j])[count:]] = False
    assert kept[-1].sum() <= count + recent + block


def test_heavy_hitters_never_look_at_later_blocks():
    q, k = random_qk(1, 2, 1, 70)
    pattern = heavy_hitters(6, 5, block=BLOCK)
    short = mask(pattern, q[:, :, : 3 * BLOCK], k[:, :, : 3 * BLOCK])
    assert torch.equal(mask(pattern, q, k)[:, :, : 3 * BLOCK, : 3 * BLOCK], short)


@pytest.mark.parametrize("pattern", [heavy_hitters(6, 5, block=BLOCK), voted_keys(10, probe=1, pool=1)], ids=str)
def test_a_decode_step_keeps_the_best_keys_of_its_own_row(pattern):
    n = 50
    q, k = random_qk(1, 1, 1, n)
    kept = mask(pattern, q[:, :, -1:], k)[0, 0, 0]
    assert kept.sum() == 11
    newest = 5 if "heavy" in str(pattern) else 1
    assert kept[-newest:].all()
    scores = (k[0, 0] @ q[0, 0, -1])[: n - newest]
    assert kept[: n - newest].nonzero().flatten().tolist() == sorted(scores.topk(11 - newest).indices.tolist())


def test_votes_are_pooled():
    n = 64
    key = torch.zeros(1, 1, n, 4)
    key[..., 20, 0], key[..., 40, 0] = 1.0, 0.7
    query = torch.zeros(1, 1, n, 4)
    query[..., 0] = 30.0
    kept = mask(voted_keys(6, probe=4, pool=5), query, key)[0, 0, -1]
    assert kept.nonzero().flatten().tolist()[:5] == [18, 19, 20, 21, 22]
    assert kept[38:43].sum() == 1
    assert kept[-4:].all()


def test_last_queries_are_dense_in_prefill_alone():
    q, k = random_qk(1, 2, 1, 70)
    pattern = window(3) | last_queries(8, block=BLOCK)
    kept, rows = mask(pattern, q, k)[0, 0], torch.arange(70)
    # The last 8 of 70 rows lie in the blocks from 48 and from 64 on.
    expected = (rows - rows[:, None] > -3) & (rows <= rows[:, None]) | ((rows[:, None] >= 48) & (rows <= rows[:, None]))
    assert torch.equal(kept, expected)
    assert mask(pattern, q[:, :, -1:], k)[0, 0].sum() == 3


def test_dense_phases():
    q, k = random_qk(1, 2, 1, 40)
    decode = q[:, :, -1:]
    assert mask(window(2) | dense_prefill(), q, k)[0, 0].sum() == 820
    assert mask(window(2) | dense_prefill(), decode, k)[0, 0].sum() == 2
    assert mask(window(2) | dense_decode(), q, k)[0, 0].sum() == 79
    assert mask(window(2) | dense_decode(), decode, k)[0, 0].sum() == 40


@given(st.integers(1, 12), st.integers(1, 40))
def test_the_two_forms_of_a_probe_agree(count, n):
    """The last rows as straightened lines, and the same rows as if they were anywhere."""
    count = min(count, n)
    rows = torch.arange(n - count, n)
    attention = torch.rand(2, 3, count, n).masked_fill(torch.arange(n) > rows[:, None], 0)
    lines, scattered = LastRows(attention.flip(-2)), ScatteredRows(attention, rows)
    for one, other in (
        (lines.by_key(lines.cells)[..., -n:], scattered.by_key(scattered.cells)),
        (lines.by_distance(lines.cells), scattered.by_distance(scattered.cells)),
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(lines.causal[:, -n:].flip(0), scattered.causal)
    values = torch.rand(2, 3, n)
    spread = lines.of_distance(values)[..., -n:].flip(-2)
    assert torch.equal(spread[..., scattered.causal], scattered.of_distance(values)[..., scattered.causal])
    expected = sum(attention[0, 0, p, j] for p, i in enumerate(rows.tolist()) for j in [i - 1] if j >= 0)
    if n > 1:
        assert float(lines.by_distance(lines.cells)[0, 0, 1]) == pytest.approx(float(expected), abs=1e-5)
