"""Dynamic atoms: what they choose on inputs whose answer is known, and the rules every one of them obeys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import Pattern, Spans, UserError, attend
from attnsieve.patterns import (
    antidiagonal_blocks,
    columns,
    dam_online,
    dense,
    pooled_blocks,
    probed_blocks,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    window,
)
from attnsieve.patterns.dynamic import DynamicAtom
from attnsieve.selection import choose
from attnsieve.testing import relative_error
from tests.laws.samples import atom_classes

BLOCK = 16
SAMPLES = [
    vertical_slash(mass=0.8, probe=8),
    vertical_slash(mass=0.9, probe=4, strided=6),
    dam_online(tau=0.2, mu=0.5, probe=4),
    probed_blocks(mass=0.8, block=BLOCK, rows=3),
    antidiagonal_blocks(mass=0.8, block=BLOCK, stride=4),
    pooled_blocks(ratio=0.2, block=BLOCK),
    top_blocks(2, block=BLOCK),
    sink(2) | window(5) | top_blocks(1, block=BLOCK) | random_blocks(1, block=24),
]
BLOCKWISE = SAMPLES[3:7]


def random_qk(batch, heads, kv_heads, n, width=8, scale=2.0):
    return scale * torch.randn(batch, heads, n, width), torch.randn(batch, kv_heads, n, width)


def mask(pattern, q, k, spans=None):
    """bool [Z, H, nq, nk] for one sequence per batch row."""
    layout = choose([pattern] * q.shape[1], q, k, spans=spans)
    n = k.shape[2]
    return layout.dense(torch.arange(n - q.shape[2], n), torch.arange(n))


def test_every_dynamic_atom_has_a_sample():
    used = {type(atom) for pattern in SAMPLES for atom in pattern}
    assert atom_classes(DynamicAtom) <= used


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_text_round_trips(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.dynamic


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_batch_mates_and_padding_do_not_matter(pattern):
    n, pads = 80, [0, 23, 64]
    q, k = random_qk(3, 4, 2, n)
    for b, pad in enumerate(pads):
        q[b, :, :pad], k[b, :, :pad] = torch.nan, torch.nan
    layout = choose([pattern] * 4, q, k, spans=Spans.left_padded(torch.tensor(pads), n, n))
    for b, pad in enumerate(pads):
        alone = choose([pattern] * 4, q[b : b + 1, :, pad:], k[b : b + 1, :, pad:])
        rows = torch.arange(n - pad)
        assert torch.equal(layout.dense(rows, rows)[b], alone.dense(rows, rows)[0])


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_packed_documents_choose_alone(pattern):
    lengths = [30, 50]
    q, k = random_qk(1, 2, 1, 80)
    v = torch.randn_like(k)
    spans = Spans.packed(lengths)
    packed = attend(q, k, v, choose([pattern] * 2, q, k, spans=spans), spans=spans)
    start = 0
    for n in lengths:
        part = [tensor[:, :, start : start + n] for tensor in (q, k, v)]
        alone = attend(*part, choose([pattern] * 2, *part[:2]))
        assert relative_error(packed[:, :, start : start + n], alone) < 1e-6
        start += n


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_masks_are_causal(pattern):
    assert not mask(pattern, *random_qk(1, 2, 2, 70)).triu(1).any()


@pytest.mark.parametrize("pattern", BLOCKWISE, ids=str)
def test_chunks_cut_at_block_borders_choose_the_same(pattern):
    n = 5 * BLOCK + 7
    q, k = random_qk(1, 2, 1, n)
    whole = mask(pattern, q, k)
    for start, stop in [(0, 2 * BLOCK), (2 * BLOCK, 4 * BLOCK), (4 * BLOCK, n)]:
        part = mask(pattern, q[:, :, start:stop], k[:, :, :stop])
        assert torch.equal(part, whole[:, :, start:stop, :stop])


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_decode_chooses_for_its_own_row(pattern):
    q, k = random_qk(1, 2, 1, 61)
    alone = mask(pattern, q[:, :, -1:], k)
    noisy = q.clone()
    noisy[:, :, :-1] = 0
    assert torch.equal(alone, mask(pattern, noisy[:, :, -1:], k))
    assert alone.any()


@given(st.floats(0.05, 1.0), st.integers(1, 20), st.integers(0, 9), st.integers(2, 90))
def test_vertical_slash_keeps_the_mass_of_its_probe(mass, probe, strided, n):
    q, k = random_qk(1, 2, 1, n)
    kept = mask(vertical_slash(mass=mass, probe=probe), q, k)[0, :, -min(probe, n) :]
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


def test_top_blocks_keeps_its_count():
    q, k = random_qk(1, 2, 1, 6 * BLOCK)
    assert choose([top_blocks(2, block=BLOCK)] * 2, q, k).blocks.count[0].tolist() == [[1, 2, 2, 2, 2, 2]] * 2


def test_heads_choose_for_themselves_and_static_heads_stay_static():
    q, k = random_qk(2, 4, 2, 70)
    patterns = [dense(), vertical_slash(mass=0.5, probe=4), window(3), top_blocks(1, block=BLOCK) | sink(1)]
    layout = choose(patterns, q, k)
    rows = torch.arange(70)
    written = layout.dense(rows, rows)
    for h in (0, 2):
        assert torch.equal(written[:, h], patterns[h].keep(rows[:, None], rows[None, :]).expand(2, 70, 70))
    for h in (1, 3):
        alone = choose([patterns[h]], q[:, h : h + 1], k[:, h // 2 : h // 2 + 1])
        assert torch.equal(written[:, h], alone.dense(rows, rows)[:, 0])


def test_a_static_row_needs_no_choice():
    q, k = random_qk(2, 2, 1, 20)
    assert choose([window(3), dense()], q, k).sequences == 1


def test_late_starts_are_refused():
    q, k = random_qk(1, 1, 1, 20)
    with pytest.raises(UserError, match="without start"):
        choose([columns(0, start=4) | top_blocks(1)], q, k)


@pytest.mark.parametrize(
    "text", ["vertical_slash(mass=0)", "top_blocks(0)", "antidiagonal_blocks(block=30)", "pooled_blocks(ratio=2)"]
)
def test_bad_settings_are_refused(text):
    with pytest.raises(UserError):
        Pattern.parse(text)
