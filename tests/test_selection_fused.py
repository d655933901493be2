"""The fused kernels that choose on a GPU, in Triton's interpreter, against the same rules in plain torch."""

import importlib

import pytest
import torch

from attnsieve import Spans
from attnsieve.patterns import antidiagonal_blocks, dam_online, probed_blocks, probed_keys, vertical_slash, voted_keys
from attnsieve.selection import blocks, choose, fused
from attnsieve.selection.sequence import SequenceQK, fewest_with_mass, shares_of, with_room
from tests.gpu_compiler import compiled
from tests.interpreter import needs_interpreter
from tests.selection_samples import random_qk, shared

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")]
PROBES = [
    vertical_slash(mass=0.8, probe=70),
    vertical_slash(mass=0.9, probe=9, strided=3),
    dam_online(tau=0.4, mu=0.5, probe=16, strided=2),
    voted_keys(9, probe=20, pool=3),
    probed_keys(mass=0.7, block=32, rows=3),
    probed_blocks(mass=0.7, block=32, rows=4),
    probed_blocks(mass=0.8, block=24, rows=1),
    antidiagonal_blocks(mass=0.5, block=32, stride=4),
    vertical_slash(mass=0.5, probe=70, band=16),
]


@pytest.fixture
def on_chip(monkeypatch):
    """Call it to have kernels choose from then on; programs end after one tile of keys."""

    def start():
        for module in ("lse", "masses"):
            monkeypatch.setattr(importlib.import_module(f"attnsieve.selection.fused.{module}"), "TILES_AT_ONCE", 1)
        monkeypatch.setattr(fused, "serves", lambda x: True)

    return start


def check(pattern, q, k, start, spans=None, differing=1e-3):
    """The same masks, but for close calls: sums are rounded in another order."""
    rows = torch.arange(k.shape[2])
    expected = choose([pattern] * q.shape[1], q, k, spans=spans).dense(rows, rows)
    start()
    found = choose([pattern] * q.shape[1], q, k, spans=spans).dense(rows, rows)
    assert float((found != expected).float().mean()) <= differing
    assert expected.float().mean() < 0.45


@pytest.mark.parametrize("pattern", PROBES, ids=str)
def test_chooses_what_plain_torch_chooses(pattern, on_chip):
    check(pattern, *random_qk(1, 6, 2, 130, width=24), on_chip)


@pytest.mark.parametrize("pattern", [*map(shared, PROBES)], ids=str)
def test_groups_of_seven_choose_together_in_a_chunk(pattern, on_chip):
    q, k = random_qk(1, 7, 1, 80, width=16)
    check(pattern, q[:, :, 35:], k, on_chip)


@pytest.mark.parametrize("pattern", PROBES, ids=str)
def test_a_decode_step_chooses_what_plain_torch_chooses(pattern, on_chip):
    q, k = random_qk(2, 3, 3, 70, width=16)
    check(pattern, q[:, :, -1:], k, on_chip)


@pytest.mark.parametrize(
    ("dtype", "group", "width"), [(torch.bfloat16, 4, 128), (torch.bfloat16, 1, 80), (torch.float16, 3, 64)]
)
def test_half_precision_and_head_widths(dtype, group, width, on_chip):
    for pattern in (vertical_slash(mass=0.7, probe=20), shared(probed_keys(mass=0.6, block=64, rows=2))):
        q, k = (x.to(dtype) for x in random_qk(1, group, 1, 129, width=width, scale=1.5))
        # k as models hold it: heads beside each other.
        check(pattern, q, k.transpose(1, 2).contiguous().transpose(1, 2), on_chip)


@pytest.mark.parametrize("pattern", [PROBES[0], shared(PROBES[7])], ids=str)
def test_padding_and_batch_mates_do_not_matter(pattern, on_chip):
    n, pads = 90, [0, 41]
    q, k = random_qk(2, 4, 2, n, width=16)
    for b, pad in enumerate(pads):
        q[b, :, :pad], k[b, :, :pad] = torch.nan, torch.nan
    on_chip()
    layout = choose([pattern] * 4, q, k, spans=Spans.left_padded(torch.tensor(pads), n, n))
    for b, pad in enumerate(pads):
        rows = torch.arange(n - pad)
        alone = choose([pattern] * 4, q[b : b + 1, :, pad:], k[b : b + 1, :, pad:])
        assert torch.equal(layout.dense(rows, rows)[b], alone.dense(rows, rows)[0])


@pytest.mark.parametrize("pattern", [PROBES[4], PROBES[7]], ids=str)
def test_chunks_and_rows_of_blocks_choose_alone(pattern, on_chip, monkeypatch):
    q, k = random_qk(1, 2, 1, 120, width=16)
    on_chip()
    rows, whole = torch.arange(120), choose([pattern] * 2, q, k)
    for start, stop in [(0, 96), (96, 120)]:
        part = choose([pattern] * 2, q[:, :, start:stop], k[:, :, :stop])
        assert torch.equal(part.dense(rows[start:stop], rows[:stop]), whole.dense(rows[start:stop], rows[:stop]))
    monkeypatch.setitem(blocks.CELLS_AT_ONCE, "cpu", 500)
    assert torch.equal(choose([pattern] * 2, q, k).dense(rows, rows), whole.dense(rows, rows))


@pytest.mark.parametrize("pattern", [PROBES[1], shared(PROBES[2])], ids=str)
def test_heads_are_added_up_some_at_a_time(pattern, on_chip, monkeypatch):
    """The sums of scattered rows of all heads are larger than all else that a choice takes."""
    from attnsieve.selection.fused import slash

    q, k = random_qk(2, 4, 2, 40, width=16)
    on_chip()
    whole, heads, right = choose([pattern] * 4, q, k), [], slash.Cells._sums
    monkeypatch.setattr(slash, "SUMS_AT_ONCE", 1)
    monkeypatch.setattr(slash.Cells, "_sums", lambda cells, *rest: heads.append(cells.k.shape[1]) or right(cells, *rest))
    parts = choose([pattern] * 4, q, k)
    assert set(heads) == {1}
    assert torch.equal(parts.end, whole.end)
    assert torch.equal(parts.offset, whole.offset)


@pytest.mark.parametrize("together", [False, True])
def test_masses_of_more_rows_than_a_program_holds(together, on_chip):
    from attnsieve.selection.fused.masses import Sums, by_block, by_key
    from attnsieve.selection.fused.rows import ProbedRows

    n, count = 230, 200
    q, k = random_qk(1, 3, 1, n, width=16)
    sequence, rows = SequenceQK(q, k, 0.3, together), torch.arange(n - count, n)
    expected = sequence.attention(rows).unflatten(2, (2, -1)).sum(3) * (3 if together else 1)
    on_chip()
    probed, sums = ProbedRows.of(sequence, rows), Sums(count // 2, together)
    read = torch.arange(n) <= torch.tensor([n - count // 2 - 1, n - 1])[:, None]
    torch.testing.assert_close(by_key(probed, k, sums)[..., read], expected[..., read])
    blocks = torch.nn.functional.pad(expected, (0, -n % 40)).unflatten(-1, (-1, 40)).sum(-1)
    torch.testing.assert_close(by_block(probed, k, 40, sums), blocks)


def test_rows_that_are_there_again_count_once(on_chip):
    """Two queries for 96 rows: of the three parts that programs take, the middle one reads nothing."""
    q, k = random_qk(1, 2, 1, 70, width=16)
    sequence = SequenceQK(q[:, :, -2:], k, 0.5)
    rows, fresh, _ = blocks._sampled(q, 68, 70, 128, 96)
    expected = blocks._masses(sequence, rows, fresh, 1)
    on_chip()
    torch.testing.assert_close(blocks._fused_masses(sequence, rows, fresh, 1), expected)


WEIGHTS = {
    "random": lambda width: torch.rand(3, width),
    "heavy": lambda width: torch.randn(3, width).mul(6).exp(),
    "equal": lambda width: torch.full((3, width), 0.125),
    "few levels": lambda width: torch.randint(0, 4, (3, width)) / 32,
    "one": lambda width: torch.eye(width)[:3],
    "tiny": lambda width: torch.rand(3, width) * 1e-38,
    "nothing": lambda width: torch.zeros(3, width),
}


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("width", [1, 300])
def test_the_search_finds_what_sorting_finds(kind, width, in_registers, monkeypatch):
    """The mass is reached, without the least entry kept it is not, and of equal entries the first are kept."""
    from attnsieve.selection.fused import fewest

    weights = WEIGHTS[kind](width)
    if not in_registers:
        monkeypatch.setattr(fewest, "MOST_IN_REGISTERS", 0)
        monkeypatch.setattr(fewest, "PER_WARP", 16)
        monkeypatch.setattr(fewest, "multiprocessors", lambda device: 132)
    for mass in (0.3, 0.6, 1.0):
        kept = fewest.fewest_with_mass(weights, with_room(mass))
        total, held = weights.double().sum(-1), (weights.double() * kept).sum(-1)
        assert (held >= total * (mass - 1e-5)).all()
        least = weights.double().masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        below = torch.where(least.isfinite().squeeze(-1), held - least.squeeze(-1), -1)
        assert (below <= total * (mass + 1e-6)).all()
        assert not (kept & (weights == 0)).any()
        # Nothing larger is left out, and no earlier one of the least ones.
        ties = weights.double() == least
        assert not (~kept & (weights.double() > least)).any()
        assert not ((ties & ~kept).cumsum(-1).bool() & ties & kept).any()
        if kind != "heavy":
            assert torch.equal(kept, fewest_with_mass(weights, mass))


@pytest.mark.parametrize("in_registers", [True, False])
def test_every_head_has_a_mass_of_its_own(in_registers, monkeypatch):
    from attnsieve.selection.fused import fewest

    if not in_registers:
        monkeypatch.setattr(fewest, "MOST_IN_REGISTERS", 0)
        monkeypatch.setattr(fewest, "PER_WARP", 16)
    weights, masses = torch.rand(2, 3, 4, 70), (0.2, 0.9, 0.5)
    shares = shares_of(masses, weights.device)
    alone = torch.stack([fewest_with_mass(weights[:, h], mass) for h, mass in enumerate(masses)], dim=1)
    assert torch.equal(fewest_with_mass(weights, shares), alone)
    assert torch.equal(fewest.fewest_with_mass(weights, shares), alone)
    assert torch.equal(fewest.fewest_with_mass(weights[:, :, 0], shares), alone[:, :, 0])


@pytest.mark.parametrize("in_registers", [True, False])
def test_entries_beyond_the_end_of_a_row_are_not_read(in_registers, monkeypatch):
    """Of rows in memory those up to the next multiple of 4 are, and are 0."""
    from attnsieve.selection.fused import fewest

    if not in_registers:
        monkeypatch.setattr(fewest, "MOST_IN_REGISTERS", 0)
        monkeypatch.setattr(fewest, "PER_WARP", 2)
    weights, stops = torch.rand(2, 3, 50), torch.tensor([7, 50, 1], dtype=torch.int32)
    place, room = torch.arange(50), 1 if in_registers else 4
    weights.masked_fill_(place >= stops[:, None], 0)
    poisoned = weights.masked_fill(place >= -(-stops[:, None] // room) * room, torch.nan)
    assert torch.equal(fewest.fewest_with_mass(poisoned, with_room(0.6), stops), fewest_with_mass(weights, 0.6, stops))


@pytest.mark.parametrize(("side", "keys", "first"), [(16, 16, 0), (16, 1, 3), (24, 8, 1)])
def test_lists_hold_the_flags_that_queries_read(side, keys, first):
    from attnsieve.selection.fused.lists import listed

    table = torch.rand(2, 3, 5, (first + 5) * side // keys) < 0.4
    count, index = listed(table, side, keys, first)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        row = table[tuple(place)][: (first + place[2] + 1) * side // keys].nonzero().flatten()
        assert int(count[tuple(place)]) == len(row)
        assert torch.equal(index[tuple(place)][: len(row)].long(), row)
        assert (index[tuple(place)][len(row) :] == -1).all()


PROGRAM = """
import torch
from attnsieve.selection import fused
from attnsieve.selection.fused import fewest, lists, masses, rows, slash
from attnsieve.selection.sequence import SequenceQK

sequence = SequenceQK(torch.zeros(1, 4, 300, 128).bfloat16(), torch.zeros(1, 1, 300, 128).bfloat16(), 0.1)
slash.larger_shares(sequence, torch.arange(236, 300), 64)
probed = rows.ProbedRows.of(sequence, torch.arange(7, 300, 8)[:36])
masses.by_key(probed, sequence.k, masses.Sums(4, True))
masses.by_block(rows.ProbedRows.of_squares(sequence, range(32), 8), sequence.k, 8, masses.Sums(8, False))
for width in (300, 10000):
    fewest.fewest_with_mass(torch.zeros(3, width), 0.9)
lists.listed(torch.zeros(1, 4, 5, 5, dtype=torch.bool), 64, 64, 0)
"""


def test_the_kernels_compile_for_a_gpu():
    found = compiled(PROGRAM)
    assert {"lse_kernel", "keys_kernel", "fold_kernel", "slash_kernel", "short_kernel", "long_kernel", "fill_kernel"} <= set(
        found
    )
