"""Guard rails: what a budget may not save on."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnsieve.errors import require
from attnsieve.patterns import Pattern, dense, dense_decode, last_queries
from attnsieve.profiling import Measurement

BLOCK = 64


def guarded(pattern: Pattern, rail: Pattern) -> Pattern:
    """`pattern` joined with a guard rail; dense() needs none."""
    return pattern if pattern == dense() else pattern | rail


def with_last_rows(measurement: Measurement, rows: int) -> Measurement:
    """`measurement` as if every candidate but dense() also kept every key for the last `rows` queries of a prompt.

    The added pairs are counted as if none of them had been kept, so densities are upper bounds; retained mass is left as it
    was measured and errors too, which the guard can only better. Measuring candidates with the guard gives exact numbers.
    Raises UserError unless rows is a whole number from 1.
    """
    require(type(rows) is int and rows >= 1, f"last_rows must be a whole number from 1, got {rows!r}")
    added = torch.tensor([_share_of_last(length, rows) for length in measurement.lengths])
    texts, density = [], measurement.density.clone()
    for number, text in enumerate(measurement.candidates):
        pattern = Pattern.parse(text)
        safer = guarded(pattern, last_queries(rows, block=BLOCK))
        texts.append(str(safer))
        if safer != pattern:
            density[:, number] = (density[:, number] + added[:, None, None]).clamp_max(1)
    return replace(measurement, candidates=tuple(texts), density=density)


def with_dense_decode(measurement: Measurement) -> Measurement:
    """`measurement` as if every candidate also kept every key in decode steps, which texts do not measure: tables stay."""
    texts = tuple(str(guarded(Pattern.parse(text), dense_decode())) for text in measurement.candidates)
    return replace(measurement, candidates=texts)


def _share_of_last(length: int, rows: int) -> float:
    """Share of the causal pairs of a text that lie in the blocks of rows which hold its last `rows`."""
    before = max(0, length - rows) // BLOCK * BLOCK
    return 1 - before * (before + 1) / (length * (length + 1))


def place_of_dense(measurement: Measurement) -> int:
    """The candidate that keeps everything. Raises UserError if it was not measured."""
    text = str(dense())
    require(text in measurement.candidates, f"dense layers need the candidate {text}, which attnsieve measure adds by itself")
    return measurement.candidates.index(text)
