"""Laws of patterns and layouts: every atom, random unions, no attention involved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve.layout import compile_layout, counting
from attnsieve.layout.vectors import Layout
from attnsieve.patterns import Captured, Pattern, columns, dense, diagonals, window
from tests.laws.samples import SAMPLES, atom_classes, captured, patterns

LENGTHS = [1, 31, 129, 200]


def written_out(pattern: Pattern, n: int) -> torch.Tensor:
    i = torch.arange(n)
    return pattern.keep(i[:, None], i[None, :])


def corners_of(pattern: Pattern) -> dict:
    return {atom.digest: atom.bits for atom in pattern if isinstance(atom, Captured)}


def test_every_atom_has_a_sample():
    used = {type(atom) for pattern in SAMPLES for atom in pattern}
    missing = {cls.__name__ for cls in atom_classes() if not cls.dynamic and cls.__module__.startswith("attnsieve")} - {
        cls.__name__ for cls in used
    }
    assert not missing, f"add samples of {missing}"


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_text_round_trips(pattern):
    assert Pattern.parse(str(pattern), corners_of(pattern)) == pattern


@given(patterns())
def test_text_round_trips_for_unions(pattern):
    assert Pattern.parse(str(pattern), corners_of(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["(sink(4) | window(9)) | columns(2)", "sink(4) | (window(9) | columns(2))", "sink(4)|((columns(2)\n|window(9)))"]
)
def test_text_may_have_brackets(text):
    assert str(Pattern.parse(text)) == "columns(2) | sink(4) | window(9)"


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_layout_equals_definition(pattern, n):
    rows = torch.arange(n)
    layout = compile_layout([pattern], n)
    assert torch.equal(layout.dense(rows, rows)[0, 0], written_out(pattern, n))
    assert layout.pairs().item() == written_out(pattern, n).sum()


@given(st.lists(patterns(), min_size=1, max_size=3), st.integers(1, 170))
def test_layout_equals_definition_for_unions(heads, n):
    rows = torch.arange(n)
    layout = compile_layout(heads, n)
    expected = torch.stack([written_out(pattern, n) for pattern in heads])
    assert torch.equal(layout.dense(rows, rows)[0], expected)
    assert torch.equal(layout.pairs()[0], expected.sum((1, 2)))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("window", [None, 9])
def test_corners_are_written_and_counted_in_parts(n, window, monkeypatch):
    heads = [pattern for pattern in SAMPLES if pattern.corner_rows or window is None]
    monkeypatch.setattr(counting, "_CORNER_PAIRS", 70)
    parts, rows = compile_layout(heads, n, window=window), torch.arange(n)
    near = rows[:, None] - rows < (window or n)
    expected = torch.stack([written_out(pattern, n) & near for pattern in heads])
    assert torch.equal(parts.dense(rows, rows)[0], expected)
    for some in {1, n // 2 + 1, n}:
        assert torch.equal(parts.pairs(some)[0], expected[:, :some, :some].sum((1, 2)))


def test_no_large_corner_is_written_out(monkeypatch):
    """Of columns and diagonals that begin late, only packed bits are in proportion to the pairs of the rows before."""
    start, most = 3000, []

    def watched(keep):
        def kept(*arguments):
            found = keep(*arguments)
            most.append(found.numel())
            return found

        return kept

    for kind in (Pattern, Layout):
        monkeypatch.setattr(kind, "keep", watched(kind.keep))
    layout = compile_layout([columns(5, start=start) | diagonals(0, start=start + 1)], 4096)
    assert layout.pairs().item() == (4096 - start) + (4096 - start - 1)
    assert layout.corner.shape == (1, start + 1, start // 8 + 1)
    assert max(most) < start**2 / 2


@given(patterns(), st.integers(1, 100), st.integers(1, 80))
def test_longer_text_never_changes_earlier_rows(pattern, n, more):
    rows = torch.arange(n)
    short, long = compile_layout([pattern], n), compile_layout([pattern], n + more)
    assert torch.equal(short.dense(rows, rows), long.dense(rows, rows))
    assert torch.equal(short.pairs(), long.pairs(n))


@given(patterns(), patterns(), st.integers(1, 160))
def test_union_is_or(one, other, n):
    assert torch.equal(written_out(one | other, n), written_out(one, n) | written_out(other, n))
    assert one | other == other | one
    assert one | one == one


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_never_keeps_the_future(pattern):
    assert not written_out(pattern, 70).triu(1).any()


def test_dense_absorbs_everything():
    assert dense() | window(3) | captured(9) == dense()


def test_density_of_dense_is_one():
    assert compile_layout([dense()], 77).density().item() == 1.0
