"""Tables of several choices in one layer, joined some rows of blocks at a time: the same lists as all at once."""

import pytest
import torch

from attnsieve import Spans, attend
from attnsieve.patterns import (
    antidiagonal_blocks,
    dense_decode,
    last_queries,
    probed_blocks,
    probed_keys,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    window,
)
from attnsieve.selection import blocks, choose, join
from attnsieve.selection.carriers import carriers
from attnsieve.selection.sequence import shares_of

N = 150
KEYS, COARSE = probed_keys(mass=0.7, block=16, rows=3), probed_keys(mass=0.6, block=48, rows=2)
ROWS = {
    "static heads beside": [KEYS, sink(1) | window(5), KEYS | window(3), sink(2)],
    "blocks beside": [KEYS, top_blocks(2, block=32), KEYS | top_blocks(1, block=16), window(4)],
    "random blocks beside": [KEYS, KEYS | random_blocks(2, block=24), random_blocks(1, block=24), COARSE],
    "two sizes in one head": [KEYS | COARSE, KEYS, COARSE, window(1)],
}


@pytest.mark.parametrize("first", [0, 37, 130])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_parts_are_joined_some_rows_at_a_time(row, first, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, N - first, 8), torch.randn(2, 2, N, 8)
    spans = Spans.of([(0, 0, N - first, 0, N), (1, 5, N - first - 5, 5, N - 5)]) if first < 130 else None
    whole, at_once, right = choose(row, q, k, spans=spans), [], join._lists
    monkeypatch.setattr(join, "FLAGS_AT_ONCE", 1)
    monkeypatch.setitem(blocks.CELLS_AT_ONCE, "cpu", 1)
    monkeypatch.setattr(join, "_lists", lambda table, *rest: at_once.append(table.shape[2]) or right(table, *rest))
    parts = choose(row, q, k, spans=spans)
    assert set(at_once) == {1}
    assert torch.equal(parts.blocks.count, whole.blocks.count)
    assert torch.equal(parts.blocks.index, whole.blocks.index)
    assert torch.equal(parts.end, whole.end)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("queries", [1, 40])
def test_random_blocks_beside_choices_without_blocks_are_those_of_every_sequence(queries, backend):
    torch.manual_seed(0)
    row = [random_blocks(2, block=8) | dense_decode(), vertical_slash(mass=0.3), random_blocks(1, block=8), window(3)]
    q, k, v = torch.randn(3, 4, queries, 8), torch.randn(3, 2, 40, 8), torch.randn(3, 2, 40, 8)
    layout = choose(row, q, k)
    assert layout.blocks.count.shape[0] == layout.blocks.index.shape[0] == layout.sequences == 3
    out = attend(q, k, v, layout, backend=backend)
    for z in range(3):
        alone = (slice(z, z + 1), slice(None))
        own = attend(q[alone], k[alone], v[alone], choose(row, q[alone], k[alone]), backend=backend)
        torch.testing.assert_close(out[alone], own)


def test_a_sequence_that_begins_in_a_later_chunk_keeps_its_random_blocks():
    row = [random_blocks(1, block=2), last_queries(4, block=4) | window(2)]
    spans = Spans.of([(0, 0, 3, 0, 9), (1, 2, 1, 8, 1)])
    layout = choose(row, torch.randn(2, 2, 3, 8), torch.randn(2, 2, 9, 8), spans=spans)
    assert layout.dense(torch.arange(1), torch.arange(1))[1].all()


@pytest.mark.parametrize("share", ["none", "kv"])
@pytest.mark.parametrize(
    "rule",
    [
        lambda mass, share: vertical_slash(mass=mass, probe=16, strided=4, share=share),
        lambda mass, share: probed_keys(mass=mass, block=16, rows=4, share=share),
        lambda mass, share: probed_blocks(mass=mass, block=16, rows=4, share=share),
        lambda mass, share: antidiagonal_blocks(mass=mass, block=16, stride=4, share=share),
    ],
    ids=["vertical_slash", "probed_keys", "probed_blocks", "antidiagonal_blocks"],
)
def test_heads_that_differ_by_their_mass_choose_at_once_and_as_alone(rule, share):
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 6, 70, 8), torch.randn(2, 3, 70, 8)
    masses = [0.4, 0.4, 0.9, 0.9, 0.7, 0.7] if share == "kv" else [0.4, 0.9, 0.9, 0.6, 0.7, 0.4]
    row = [rule(mass, share) | sink(1) for mass in masses]
    assert len(carriers(tuple(row), 2)) == 1
    place = torch.arange(70)
    together = choose(row, q, k).dense(place, place)
    for number, mass in enumerate(masses):
        alone = choose([rule(mass, share) | sink(1)] * 6, q, k).dense(place, place)
        head = number // (6 // alone.shape[1])
        assert torch.equal(together[:, number // (6 // together.shape[1])], alone[:, head])


def test_masses_are_float32_whatever_torch_makes_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        shares = shares_of((0.93, 0.51), torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert shares.dtype == torch.float32


def test_a_head_with_two_masses_of_one_rule_keeps_both():
    torch.manual_seed(0)
    q, k, place = 2 * torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8), torch.arange(50)
    few, many, coarse = probed_keys(mass=0.3), probed_keys(mass=0.9), probed_keys(mass=0.3, rows=2)
    row = (few | many | coarse, many)
    assert [carrier.masses for carrier in carriers(row, 1)] == [None, None, None]
    found = choose(row, q, k).dense(place, place)
    parts = [choose([rule] * 2, q, k).dense(place, place) for rule in (few, many, coarse)]
    assert torch.equal(found[:, 0], (parts[0] | parts[1] | parts[2])[:, 0])
    assert torch.equal(found[:, 1], parts[1][:, 1])
