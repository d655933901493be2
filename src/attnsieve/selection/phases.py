"""Rules that read nothing but how many queries a call has."""

from __future__ import annotations

import torch

from attnsieve.patterns import FOREVER
from attnsieve.patterns.dynamic import DenseDecode, DensePrefill, LastQueries
from attnsieve.selection.sequence import Chosen, SequenceQK


def last_queries(atom: LastQueries, sequence: SequenceQK) -> Chosen:
    """Whole rows of blocks that hold any of the last queries; nothing in a decode step."""
    if sequence.q.shape[2] == 1:
        return Chosen()
    block = atom.block
    blocks, first = -(-sequence.tokens // block), max(sequence.first_row, sequence.tokens - atom.count) // block
    row = torch.arange(sequence.first_row // block, blocks, device=sequence.q.device)
    return Chosen(table=(row >= first)[:, None].expand(1, 1, len(row), blocks), block=block, keys=block)


def dense_prefill(_: DensePrefill, sequence: SequenceQK) -> Chosen:
    """Everything in calls of several queries."""
    return Chosen() if sequence.q.shape[2] == 1 else _everything(sequence)


def dense_decode(_: DenseDecode, sequence: SequenceQK) -> Chosen:
    """Everything in calls of one query."""
    return _everything(sequence) if sequence.q.shape[2] == 1 else Chosen()


def _everything(sequence: SequenceQK) -> Chosen:
    return Chosen(end=torch.full((1, 1, sequence.tokens), FOREVER, dtype=torch.int32, device=sequence.q.device))
