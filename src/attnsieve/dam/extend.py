"""The extended mask (arXiv 2506.11104, sections 4.2 and 4.3): the true mask below L, matched patterns from row L on."""

from __future__ import annotations

from torch import Tensor

from attnsieve.patterns import Captured, Pattern, columns, diagonals


def extend(mask: Tensor, diagonal: Tensor, column: Tensor) -> Pattern:
    """The pattern of one head. mask: causal bool [L, L]; diagonal, column: bool [L], the matched ones.

    Row i < L keeps the true mask only; row i >= L keeps j where column[j] or diagonal[i - j], positions absolute.
    """
    start = mask.shape[-1]
    pattern = Pattern.of(Captured.from_mask(mask.cpu()))
    distances, positions = diagonal.nonzero().flatten().tolist(), column.nonzero().flatten().tolist()
    if distances:
        pattern |= diagonals(*distances, start=start)
    if positions:
        pattern |= columns(*positions, start=start)
    return pattern


def reach(layers: int, distance: int) -> int:
    """How many positions back information can travel to a late row through all layers, if each moves it by `distance`.

    With distance L - 1 this bounds what any DAM mask of capture length L can know beyond the first L positions.
    """
    return layers * distance
