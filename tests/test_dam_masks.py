"""True masks and pattern matching: the written-out vectors of real heads, an explicit pool, and the laws."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsieve.dam import (
    absolute,
    column_sums,
    cut,
    diagonal_sums,
    extend,
    force,
    join,
    kept_mass,
    mass,
    matched,
    reach,
    relative,
)
from attnsieve.errors import UserError
from attnsieve.layout import compile_layout


def cells(size, *pairs, column=False, diagonals=()):
    """Column 0 if asked, (distance, first row, last row) diagonals, and single cells."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:, 0] = column
    for distance, first, last in diagonals:
        for row in range(first, last + 1):
            mask[row, row - distance] = True
    for pair in pairs:
        mask[pair] = True
    return mask


L25H9 = cells(32, column=True, diagonals=[(0, 0, 31), (1, 1, 31), (2, 12, 31)])
L26H13 = cells(32, (2, 1), column=True, diagonals=[(0, 0, 20)])
EQUALITY = cells(8, (4, 1), (5, 2), (6, 3), column=True, diagonals=[(0, 0, 6)])


def chosen(hits, **options):
    return matched(hits, **options).nonzero().flatten().tolist()


def both(mask, **options):
    return chosen(diagonal_sums(mask), **options), chosen(column_sums(mask), **options)


def rows_of(pattern, rows, length):
    mask = compile_layout([pattern], length).dense(torch.arange(length), torch.arange(length))[0, 0]
    return [mask[row].nonzero().flatten().tolist() for row in rows]


def test_head_l25h9():
    assert L25H9.sum() == 113
    diagonal, column = diagonal_sums(L25H9), column_sums(L25H9)
    assert [int(diagonal[r]) for r in (0, 1, 2, 3, 30, 31)] == [32, 31, 21, 1, 1, 1]
    assert [int(column[c]) for c in (0, 1, 28, 29, 30, 31)] == [32, 2, 3, 3, 2, 1]
    assert both(L25H9, mu=0.8) == ([0, 1, 31], [0, 29, 30, 31])
    assert both(L25H9, mu=0.8, min_support=8) == ([0, 1], [0])


def test_head_l26h13():
    assert L26H13.sum() == 53
    diagonal, column = diagonal_sums(L26H13), column_sums(L26H13)
    assert [int(diagonal[r]) for r in (0, 1)] == [21, 2]
    assert [int(column[c]) for c in (1, 31)] == [2, 0]
    assert both(L26H13, mu=0.8) == ([31], [0])
    assert both(L26H13, mu=0.8, min_support=8) == ([], [0])


def test_equality_at_mu():
    diagonal, column = diagonal_sums(EQUALITY), column_sums(EQUALITY)
    assert diagonal.tolist() == [7, 1, 1, 4, 1, 1, 1, 1]
    assert column.tolist() == [8, 2, 2, 2, 1, 1, 1, 0]
    assert both(EQUALITY, mu=0.8) == ([0, 3, 7], [0])
    pattern = extend(EQUALITY, matched(diagonal, mu=0.8), matched(column, mu=0.8))
    assert rows_of(pattern, (7, 8, 12), 13) == [[0], [0, 1, 5, 8], [0, 5, 9, 12]]
    supported = extend(EQUALITY, matched(diagonal, mu=0.8, min_support=2), matched(column, mu=0.8, min_support=2))
    assert rows_of(supported, (8, 12), 13) == [[0, 5, 8], [0, 9, 12]]


def test_rows_below_the_capture_length_are_the_true_mask():
    pattern = extend(L25H9, matched(diagonal_sums(L25H9), mu=0.8), matched(column_sums(L25H9), mu=0.8))
    assert rows_of(pattern, range(32), 40) == [row.nonzero().flatten().tolist() for row in L25H9]
    assert rows_of(pattern, range(9), 9) == [row.nonzero().flatten().tolist() for row in L25H9[:9]]


def test_all_ones_is_dense_up_to_twice_the_capture_length():
    ones = torch.ones(6, 6, dtype=torch.bool).tril()
    everything = torch.ones(6, dtype=torch.bool)
    assert both(ones, mu=1) == (list(range(6)), list(range(6)))
    pattern = extend(ones, everything, everything)
    assert rows_of(pattern, range(12), 13) == [list(range(row + 1)) for row in range(12)]
    assert rows_of(pattern, [12], 13) == [[*range(6), *range(7, 13)]]


def test_joined_patterns_hold_in_every_row_beside_the_true_mask():
    diagonal, column = torch.zeros(32, dtype=torch.bool), torch.zeros(32, dtype=torch.bool)
    diagonal[[0, 1, 2, 7]] = True
    column[[0, 1, 5]] = True
    pattern = join(L25H9, diagonal, column)
    assert str(pattern).startswith("captured(32, ")
    assert str(pattern).endswith(" | columns(5) | diagonals(7) | sink(2) | window(3)")
    rows = rows_of(pattern, range(40), 40)
    for i, row in enumerate(rows):
        rule = {j for j in range(i + 1) if i - j in (0, 1, 2, 7) or j in (0, 1, 5)}
        captured = set(L25H9[i].nonzero().flatten().tolist()) if i < 32 else set()
        assert set(row) == rule | captured
    none = torch.zeros(32, dtype=torch.bool)
    assert str(join(L25H9, none, none)) == str(extend(L25H9, none, none))


def pool(size):
    """Every diagonal and every column as an explicit mask."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    diagonals = torch.stack([(i - j == r) for r in range(size)])
    columns = torch.stack([(j == c) & (c <= i) for c in range(size)])
    return diagonals, columns


@settings(deadline=None)
@given(
    size=st.integers(1, 23),
    fill=st.floats(0, 1),
    seed=st.integers(0, 99),
    mu=st.fractions(Fraction(1, 20), 1, max_denominator=20),
)
def test_matching_equals_an_explicit_pool(size, fill, seed, mu):
    mask = (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) < fill).tril()
    for hits, patterns in zip((diagonal_sums(mask), column_sums(mask)), pool(size), strict=True):
        found = matched(hits, mu=mu)
        for index, pattern in enumerate(patterns):
            inside = (mask & pattern).sum((-2, -1))
            assert torch.equal(hits[..., index], inside)
            share = [[Fraction(int(value), int(pattern.sum())) >= mu for value in row] for row in inside]
            assert found[..., index].tolist() == share


def test_mu_is_exact_where_floating_point_is_not():
    sizes = torch.arange(1, 4097)
    for mu in (0.55, 0.7, 0.8, 0.9, "11/20"):
        ratio = Fraction(str(mu))
        for n in sizes[:400].tolist():
            least = -(-ratio.numerator * n // ratio.denominator)
            hits = torch.zeros(n, dtype=torch.int64)
            hits[0] = least
            assert 0 in chosen(hits, mu=mu)
            hits[0] = least - 1
            assert 0 not in chosen(hits, mu=mu)


def random_maps(size=24, heads=5, spread=1.5, seed=0):
    scores = torch.randn(heads, size, size, generator=torch.Generator().manual_seed(seed)) * spread
    return scores.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf).softmax(-1)


def test_absolute_mask_shrinks_with_tau_and_matches_with_mu_and_support():
    maps, previous = random_maps(), None
    for tau in (-1.0, 0.0, 0.1, 0.3, 0.6, 1.9):
        mask = absolute(maps, tau=tau)
        assert previous is None or not (mask & ~previous).any()
        previous = mask
    assert torch.equal(absolute(maps, tau=0.0), torch.ones_like(maps).tril().bool())
    hits, previous = diagonal_sums(absolute(maps, tau=0.2)), None
    for mu, support in ((0.1, 1), (0.4, 1), (0.4, 6), (0.8, 6), (1, 6), (1, 20)):
        found = matched(hits, mu=mu, min_support=support)
        assert previous is None or not (found & ~previous).any()
        previous = found


def test_kept_keys_are_bounded():
    maps = random_maps(size=64, spread=0.4)
    for tau in (0.1, 0.2, 0.3):
        assert absolute(maps, tau=tau).sum(-1).max() <= int(1 / cut(tau, 0.5, 1e-10))


def test_diffuse_heads_have_empty_rows_from_44_on():
    uniform = torch.ones(60, 60).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    kept = absolute(uniform, tau=0.3).any(-1)
    assert kept[:44].all()
    assert not kept[44:].any()


@settings(deadline=None)
@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 50))
def test_mass_mask_is_the_smallest_that_reaches_the_share(share, seed):
    maps = random_maps(size=12, seed=seed).double()
    mask = mass(maps, share=share)
    assert not (mask & ~torch.ones(12, 12).tril().bool()).any()
    kept = (maps * mask).sum(-1)
    wanted = share * maps.sum(-1)
    assert (kept >= wanted - 1e-9).all()
    least = torch.where(mask, maps, torch.inf).amin(-1)
    assert (kept - least < wanted).all()
    assert (
        torch.where(mask, -torch.inf, maps.masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf)).amax(-1) <= least
    ).all()


def test_mass_mask_stops_at_the_share_and_takes_the_earliest_of_equals():
    quarter = torch.full((4, 4), 0.25).tril()
    assert mass(quarter, share=0.5)[3].tolist() == [True, True, False, False]
    assert mass(quarter, share=0.51)[3].tolist() == [True, True, True, False]


def test_relative_mask_does_not_tighten_with_length():
    for size in (8, 64, 256):
        uniform = torch.ones(size, size, dtype=torch.float64).tril()
        uniform /= uniform.sum(-1, keepdim=True)
        assert torch.equal(relative(uniform, kappa=0.999), torch.ones(size, size).tril().bool())
        assert not relative(uniform, kappa=1.001).any()
        assert torch.equal(relative(uniform, kappa=0), torch.ones(size, size).tril().bool())


def test_forced_cells_are_added_and_counted():
    forced, count = force(torch.stack([L26H13, L25H9]), self_key=True, sinks=2)
    assert count.tolist() == [11 + 31 - 2, 31 - 2]
    assert forced.diagonal(0, -2, -1).all()
    assert forced[:, 1:, :2].all()
    assert not forced.triu(1).any()
    untouched, count = force(L26H13, self_key=False, sinks=0)
    assert torch.equal(untouched, L26H13)
    assert count == 0


def test_kept_mass_is_the_mean_row_sum():
    maps = random_maps().double()
    torch.testing.assert_close(kept_mass(maps, torch.ones_like(maps).bool()), torch.ones(5, dtype=torch.float64))
    mask = absolute(maps, tau=0.3)
    torch.testing.assert_close(kept_mass(maps, mask), (maps * mask).sum(-1).mean(-1))


def test_reach_of_the_papers_models():
    assert [reach(28, 511), reach(16, 511), reach(28, 1023)] == [14308, 8176, 28644]


@pytest.mark.parametrize("mu", [0, -0.1, 1.01, "many", float("nan"), "1/0"])
def test_bad_mu_is_refused(mu):
    with pytest.raises(UserError, match="mu must"):
        matched(torch.ones(3), mu=mu)


def test_other_bad_options_are_refused():
    with pytest.raises(UserError, match="share"):
        mass(random_maps(), share=0)
    with pytest.raises(UserError, match="kappa"):
        relative(random_maps(), kappa=-1)
    with pytest.raises(UserError, match="sinks"):
        force(L25H9, self_key=True, sinks=33)
