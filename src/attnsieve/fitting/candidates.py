"""The candidates that budgets choose from where nobody names others: static, chosen from the input, and dense."""

from __future__ import annotations

from typing import Literal

from attnsieve.errors import require
from attnsieve.patterns import Pattern, dense, last_queries, probed_keys, sink, vertical_slash, window

# Windows wider than this part of a text look cheap in the mean over its rows, the first of which lose nothing, and lose lookups;
# unless the rows that ask read everything: then they are a good buy, up to a half (docs/LOG.md).
WIDEST = 16
WIDEST_WITH_RAILS = 2
# Single keys serve best per kept pair: the fewest blocks of 16 x 16 with a mass are nearly twice as many pairs (docs/LOG.md).
KEY_MASSES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
SLASH_MASSES = (0.5, 0.8, 0.9, 0.95)


def default_candidates(
    length: int,
    *,
    sinks: int = 4,
    local: int = 32,
    last_rows: int = 0,
    rows: int = 8,
    share: Literal["none", "kv"] = "none",
    wide_windows: bool = False,
) -> list[Pattern]:
    """Rules for one head, to be measured on texts of `length` tokens: cheap and static ones first, dense() last.

    The first `sinks` and the `local` newest keys are kept by every rule: guard rails, without which a choice that misjudges
    a text can leave a row next to nothing; `last_rows` keeps every key for that many last queries of a prompt. Static rules
    double their window up to a sixteenth of the length, with wide_windows up to a half: for budgets with both guard rails
    (`fit_budget(last_rows=, dense_decode=True)`), which they serve better. Of every 64 queries, `rows` choose the single keys of
    all: 64 are the most faithful for a density, and then a choice computes as many products as dense attention's scores.
    share="kv": the query heads of a KV group choose together.

    Raises UserError for texts shorter than twice `local`, and for numbers below 1 where a rule needs one.
    """
    require(sinks >= 1 and local >= 1, f"guard rails keep at least one sink and one local key, got {sinks} and {local}")
    require(
        2 * local <= length, f"candidates with {local} local keys are for texts of at least {2 * local} tokens, got {length}"
    )
    guard = sink(sinks) | window(local)
    if last_rows:
        guard = guard | last_queries(last_rows)
    widest = length // (WIDEST_WITH_RAILS if wide_windows else WIDEST)
    widths = [local << step for step in range(max(1, (widest // local).bit_length()))]
    static = [guard | window(width) for width in widths]
    single = [guard | probed_keys(mass=mass, rows=rows, share=share) for mass in KEY_MASSES]
    slashes = [guard | vertical_slash(mass=mass, share=share) for mass in SLASH_MASSES]
    return [*static, *single, *slashes, dense()]
