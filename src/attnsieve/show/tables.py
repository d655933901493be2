"""Plain text tables, aligned, in Markdown: the same in a terminal, a log and a README; and what fits into little room."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

T = TypeVar("T")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A Markdown table of text cells; columns named in `left` are flush left, the others flush right.

    The bar that patterns are written with is escaped, as Markdown asks for.
    """
    table = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    fits = [str.ljust if column in left else str.rjust for column in range(len(header))]
    lines = [[fit(cell, width) for fit, cell, width in zip(fits, row, widths, strict=True)] for row in table]
    lines.insert(
        1, ["-" * width if fit is str.ljust else "-" * (width - 1) + ":" for fit, width in zip(fits, widths, strict=True)]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float | None) -> str:
    """A share in percent, one decimal below ten: "0.4", "7.2", "43", "100"; "-" where it is unknown."""
    if share is None:
        return "-"
    number = 100 * share
    return f"{number:.1f}" if 0 < number < 9.95 else f"{number:.0f}"


def shortened(text: str, most: int) -> str:
    """The text, cut where it has more than `most` letters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly from the first to the last; the middle one where there is room for one."""
    count = min(most, len(items))
    if count == 1:
        return [items[len(items) // 2]]
    return [items[place * (len(items) - 1) // (count - 1)] for place in range(count)]
