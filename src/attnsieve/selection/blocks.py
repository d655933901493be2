"""Key blocks per block of queries. Blocks lie at absolute positions, so chunks cut at their borders choose the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.patterns.dynamic import AntidiagonalBlocks, PooledBlocks, ProbedBlocks, TopBlocks
from attnsieve.selection.sequence import Chosen, SequenceQK, fewest_with_mass

# Rows of exact attention held at once: bounds memory, not the result.
ROWS_AT_ONCE = 512


def probed_blocks(atom: ProbedBlocks, sequence: SequenceQK) -> Chosen:
    """Exact attention of a few rows of every query block, summed over key blocks."""
    rows = _sampled_rows(sequence, atom.block, atom.rows)
    blocks = -(-sequence.k.shape[1] // atom.block)
    mass = torch.zeros(sequence.q.shape[0], blocks, blocks, device=sequence.q.device)
    for part in rows.split(ROWS_AT_ONCE):
        by_block = _sum_keys(sequence.attention(part), atom.block)
        mass.index_add_(1, part // atom.block, by_block)
    return Chosen(table=fewest_with_mass(mass, atom.mass), block=atom.block)


def _sampled_rows(sequence: SequenceQK, block: int, count: int) -> Tensor:
    """Positions of `count` queries of every block, evenly spaced and its last among them; all of a shorter block."""
    picks = torch.arange(1, count + 1, device=sequence.q.device) * block // count - 1
    n, first = sequence.k.shape[1], sequence.first_row
    starts = torch.arange(first // block, -(-n // block), device=picks.device) * block
    rows = (starts[:, None] + picks.clamp_min(0)).clamp(first, n - 1)
    distinct: Tensor = torch.unique(rows)
    return distinct


def antidiagonal_blocks(atom: AntidiagonalBlocks, sequence: SequenceQK) -> Chosen:
    """Sums of scores along antidiagonals of stride x stride squares, softmax over squares, summed over key blocks."""
    stride, n = atom.stride, sequence.k.shape[1]
    squares = -(-n // atom.block) * (atom.block // stride)
    front, back = sequence.first_row, squares * stride - n
    q = F.pad(sequence.q.float(), (0, 0, front, back)).unflatten(1, (squares, stride)).flip(2).flatten(2)
    k = F.pad(sequence.k.float(), (0, 0, 0, back)).unflatten(1, (squares, stride)).flatten(2)
    rows = torch.arange(front // stride, -(-n // stride), device=q.device)
    scores = q[:, rows] @ k.mT * (sequence.scale / stride)
    future = torch.arange(squares, device=q.device)[None, :] > rows[:, None]
    weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
    per_block = atom.block // stride
    by_block = weights.unflatten(-1, (-1, per_block)).sum(-1)
    mass = by_block.new_zeros(len(q), by_block.shape[-1], by_block.shape[-1])
    mass.index_add_(1, rows // per_block, by_block)
    return Chosen(table=fewest_with_mass(mass, atom.mass), block=atom.block)


def pooled_blocks(atom: PooledBlocks, sequence: SequenceQK) -> Chosen:
    """Weights of pooled keys against pooled queries, relative to the largest of the row of blocks."""
    scores = _pooled_scores(sequence, atom.block)
    peak = scores.amax(-1, keepdim=True)
    kept = (scores - peak).exp() >= atom.ratio
    return Chosen(table=kept & scores.isfinite(), block=atom.block)


def top_blocks(atom: TopBlocks, sequence: SequenceQK) -> Chosen:
    """The largest pooled scores of every row of blocks."""
    scores = _pooled_scores(sequence, atom.block)
    best = scores.topk(min(atom.count, scores.shape[-1]), dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return Chosen(table=kept & scores.isfinite(), block=atom.block)


def _pooled_scores(sequence: SequenceQK, block: int) -> Tensor:
    """float32 [H, nb, nb], -inf for key blocks after the query block and rows of blocks without queries."""
    q, q_count = _pool(sequence.q, block, sequence.first_row)
    k, _ = _pool(sequence.k, block, 0)
    scores = q @ k.mT * sequence.scale
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~(causal & (q_count > 0)[:, None]), -torch.inf)


def _pool(x: Tensor, block: int, first: int) -> tuple[Tensor, Tensor]:
    """Mean per block of rows at positions first, first + 1, ...: float32 [H, nb, D], and rows per block [nb]."""
    stop = first + x.shape[1]
    owner = torch.arange(first, stop, device=x.device) // block
    total = x.new_zeros(x.shape[0], -(-stop // block), x.shape[2], dtype=torch.float32).index_add_(1, owner, x.float())
    count = torch.bincount(owner, minlength=total.shape[1])
    return total / count.clamp_min(1)[:, None], count


def _sum_keys(attention: Tensor, block: int) -> Tensor:
    """[H, R, nk] -> [H, R, nb]: attention summed over key blocks."""
    short = -attention.shape[-1] % block
    by_block: Tensor = F.pad(attention, (0, short)).unflatten(-1, (-1, block)).sum(-1)
    return by_block
