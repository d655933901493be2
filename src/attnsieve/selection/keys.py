"""Single keys, as caches with a fixed size keep them: accumulated attention (H2O) and the votes of the last queries (SnapKV)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.patterns import FOREVER
from attnsieve.patterns.dynamic import HeavyHitters, VotedKeys
from attnsieve.selection import fused
from attnsieve.selection.probe import forever, probe_rows
from attnsieve.selection.sequence import Chosen, SequenceQK


def heavy_hitters(atom: HeavyHitters, sequence: SequenceQK) -> Chosen:
    """Block after block of queries: attend to the keys that are left, add up, let the older keys compete.

    As much arithmetic as dense attention, and a fixed number of operations per block of queries.
    """
    n, first = sequence.tokens, sequence.first_row
    end = torch.full((sequence.q.shape[0], sequence.choices, n), FOREVER, dtype=torch.int32, device=sequence.q.device)
    total = torch.zeros(end.shape, device=end.device)
    borders = [first, *range((first // atom.block + 1) * atom.block, n, atom.block), n]
    if first:
        rows = torch.arange(first, borders[1], device=end.device)
        end = _compete(end, sequence.attention(rows).sum(2), atom, first)
    for start, stop in pairwise(borders):
        rows = torch.arange(start, stop, device=end.device)
        total += sequence.attention(rows, end > start).sum(2)
        end = _compete(end, total, atom, stop)
    return Chosen(end=end, mortal=True)


def _compete(end: Tensor, total: Tensor, atom: HeavyHitters, row: int) -> Tensor:
    """The ends after a competition among keys that are older than the recent ones of `row`; losers are not seen from there."""
    position = torch.arange(end.shape[-1], device=end.device)
    older = (end == FOREVER) & (position <= row - atom.recent)
    best = total.masked_fill(~older, -1).topk(min(atom.count, end.shape[-1]), dim=-1).indices
    winners = torch.zeros_like(older).scatter_(-1, best, True)
    return torch.where(older & ~winners, row, end)


def voted_keys(atom: VotedKeys, sequence: SequenceQK) -> Chosen:
    """The last queries vote on the keys before them."""
    rows = probe_rows(sequence, atom.probe)
    votes = _votes(sequence, rows)
    first = max(0, sequence.tokens - atom.probe)
    kept = torch.ones_like(votes, dtype=torch.bool)
    if first > atom.count:
        pooled = F.max_pool1d(votes[..., :first], atom.pool, stride=1, padding=atom.pool // 2)
        best = pooled.topk(atom.count, dim=-1).indices
        kept[..., :first] = torch.zeros_like(kept[..., :first]).scatter_(-1, best, True)
    return Chosen(end=forever(kept))


def _votes(sequence: SequenceQK, rows: Tensor) -> Tensor:
    """float32 [S, C, n]: the attention of all `rows`, the call's last ones, to every key, up to a factor."""
    if not fused.serves_heads(sequence.q):
        return sequence.attention(rows).sum(2)
    from attnsieve.selection.fused.masses import Sums, by_key
    from attnsieve.selection.fused.rows import ProbedRows

    return by_key(ProbedRows.of(sequence, rows), sequence.k, Sums(len(rows), sequence.together))[:, :, 0]
