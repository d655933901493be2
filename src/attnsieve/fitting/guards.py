"""Guard rails: what a budget may not save on."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnsieve.errors import require
from attnsieve.patterns import Pattern, dense, dense_decode, last_queries
from attnsieve.profiling import Measurement

BLOCK = 64


def with_last_rows(measurement: Measurement, rows: int) -> Measurement:
    """`measurement` as if every candidate but dense() also kept every key for the last `rows` queries of a prompt.

    The added pairs are counted as if none of them had been kept, so densities are upper bounds; retained mass is left as it
    was measured and errors too, which the guard can only better. Measuring candidates with the guard gives exact numbers.
    """
    require(type(rows) is int and rows >= 1, f"last_rows must be a whole number from 1, got {rows!r}")
    added = torch.tensor([_share_of_last(length, rows) for length in measurement.lengths])
    texts, density = [], measurement.density.clone()
    for number, text in enumerate(measurement.candidates):
        pattern = Pattern.parse(text)
        guarded = pattern if pattern == dense() else pattern | last_queries(rows, block=BLOCK)
        texts.append(str(guarded))
        if guarded != pattern:
            density[:, number] = (density[:, number] + added[:, None, None]).clamp_max(1)
    return replace(measurement, candidates=tuple(texts), density=density)


def with_dense_decode(measurement: Measurement) -> Measurement:
    """`measurement` as if every candidate also kept every key in decode steps, which texts do not measure: tables stay."""
    patterns = [Pattern.parse(text) for text in measurement.candidates]
    texts = [str(pattern if pattern == dense() else pattern | dense_decode()) for pattern in patterns]
    return replace(measurement, candidates=tuple(texts))


def _share_of_last(length: int, rows: int) -> float:
    """Share of the causal pairs of a text that lie in the blocks of rows which hold its last `rows`."""
    before = max(0, length - rows) // BLOCK * BLOCK
    return 1 - before * (before + 1) / (length * (length + 1))


def place_of_dense(measurement: Measurement) -> int:
    """The candidate that keeps everything. Raises UserError if it was not measured."""
    text = str(dense())
    require(text in measurement.candidates, f"dense layers need the candidate {text}, which attnsieve measure adds by itself")
    return measurement.candidates.index(text)
