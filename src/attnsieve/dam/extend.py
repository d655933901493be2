"""The extended mask (arXiv 2506.11104, sections 4.2 and 4.3): the true mask below L, matched patterns from row L on."""

from __future__ import annotations

from torch import Tensor

from attnsieve.patterns import Captured, Pattern, columns, diagonals, empty, sink, window


def extend(mask: Tensor, diagonal: Tensor, column: Tensor) -> Pattern:
    """The paper's pattern of one head. mask: causal bool [L, L]; diagonal, column: bool [L], the matched ones.

    Row i < L keeps the true mask only; row i >= L keeps j where column[j] or diagonal[i - j], positions absolute.
    """
    start = mask.shape[-1]
    pattern = Pattern.of(Captured.from_mask(mask.cpu()))
    distances, positions = _indices(diagonal), _indices(column)
    if distances:
        pattern |= diagonals(*distances, start=start)
    if positions:
        pattern |= columns(*positions, start=start)
    return pattern


def join(mask: Tensor, diagonal: Tensor, column: Tensor) -> Pattern:
    """As `extend`, but matched patterns also hold in rows below L, beside the true mask.

    A rule without a first row has a simpler spelling: the diagonals 0 .. w - 1 are window(w), the columns 0 .. s - 1 sink(s).
    """
    distances, positions = _indices(diagonal), _indices(column)
    w, s = _run(distances), _run(positions)
    pattern = Pattern.of(Captured.from_mask(mask.cpu()))
    for run, rest, whole, single in ((w, distances[w:], window, diagonals), (s, positions[s:], sink, columns)):
        pattern |= whole(run) if run else empty()
        pattern |= single(*rest) if rest else empty()
    return pattern


def _indices(chosen: Tensor) -> list[int]:
    return [int(index) for index in chosen.nonzero().flatten()]


def _run(indices: list[int]) -> int:
    """How many of the ascending `indices` are 0, 1, 2, ... from the start."""
    return next((place for place, index in enumerate(indices) if place != index), len(indices))


def reach(layers: int, distance: int) -> int:
    """How many positions back information can travel to a late row through all layers, if each moves it by `distance`.

    With distance L - 1 this bounds what any DAM mask of capture length L can know beyond the first L positions.
    """
    return layers * distance
