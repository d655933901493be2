"""Key blocks per block of queries. Blocks lie at absolute positions, so chunks cut at their borders choose the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.device import PerStream
from attnsieve.patterns.dynamic import AntidiagonalBlocks, PooledBlocks, ProbedBlocks, ProbedKeys, TopBlocks
from attnsieve.selection import fused
from attnsieve.selection.sequence import Chosen, SequenceQK, TableInParts, fewest_with_mass

# Cells of exact attention held at once: bounds memory, not the result.
CELLS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}


def probed_blocks(atom: ProbedBlocks, sequence: SequenceQK) -> Chosen:
    """Exact attention of a few rows of every query block, summed over key blocks."""
    return Chosen(table=_probed(atom, sequence, atom.block).whole(), block=atom.block, keys=atom.block)


def probed_keys(atom: ProbedKeys, sequence: SequenceQK) -> Chosen:
    """Exact attention of a few rows of every query block, key by key."""
    return Chosen(table=_probed(atom, sequence, 1), block=atom.block, keys=1)


def _probed(atom: ProbedBlocks | ProbedKeys, sequence: SequenceQK, keys: int) -> TableInParts:
    """[S, C, rows of blocks, key blocks]: the fewest blocks of `keys` keys with the mass of sampled rows."""
    rows, fresh, stops = _sampled(sequence.q, sequence.first_row, sequence.tokens, atom.block, atom.rows)
    again = _shortest(sequence, atom.block) < atom.rows
    on_chip = fused.serves_heads(sequence.q)
    masses = _fused_masses if on_chip else _masses
    # In fused kernels the attention to a single key is added up before it is written.
    cells = sequence.q.shape[1] * (1 if on_chip and keys == 1 else atom.rows) * -(-sequence.tokens // (keys if on_chip else 1))

    def choose(part: slice) -> Tensor:
        mass = masses(sequence, rows[part], fresh[part] if again else None, keys)
        return fewest_with_mass(mass, sequence.mass(atom.mass), stops[part] if on_chip and keys == 1 else None)

    return _in_parts(sequence, len(rows), -(-sequence.tokens // keys), cells, choose)


def _in_parts(sequence: SequenceQK, blocks: int, width: int, cells: int, choose: Callable[[slice], Tensor]) -> TableInParts:
    """[S, C, blocks, width] by as many rows of blocks at once as memory allows; one of them takes `cells` numbers."""
    at_once = CELLS_AT_ONCE.get(sequence.q.device.type, CELLS_AT_ONCE["cuda"]) // (cells * len(sequence.q))
    return TableInParts((len(sequence.q), sequence.choices, blocks, width), max(1, at_once), choose)


def _masses(sequence: SequenceQK, rows: Tensor, fresh: Tensor | None, keys: int) -> Tensor:
    """float32 [S, C, blocks, key blocks]: attention of rows [blocks, count], summed over those that are fresh and over keys."""
    mass = _sum_keys(sequence.attention(rows.flatten()), keys).unflatten(2, rows.shape)
    summed: Tensor = (mass if fresh is None else mass * fresh[..., None]).sum(3)
    return summed


def _fused_masses(sequence: SequenceQK, rows: Tensor, fresh: Tensor | None, keys: int) -> Tensor:
    from attnsieve.selection.fused.masses import Sums, by_block, by_key
    from attnsieve.selection.fused.rows import ProbedRows

    probed = ProbedRows.of(sequence, rows.flatten(), None if fresh is None else fresh.flatten())
    sums = Sums(rows.shape[1], sequence.together)
    return by_key(probed, sequence.k, sums) if keys == 1 else by_block(probed, sequence.k, keys, sums)


def _shortest(sequence: SequenceQK, block: int) -> int:
    """Queries of the block that has fewest: the call's first or last one."""
    n, first = sequence.tokens, sequence.first_row
    return min(n - first, block - first % block, (n - 1) % block + 1)


class _Sampled(NamedTuple):
    """Queries that stand for every block, evenly spaced and its last among them. rows: int32 [blocks, count], their positions; fresh:
    bool, whether each is there for the first time: a block with fewer queries has them several times; stops: int32 [blocks], how
    many keys each block reads."""

    rows: Tensor
    fresh: Tensor
    stops: Tensor


@PerStream
def _sampled(device: torch.device, first: int, n: int, block: int, count: int) -> _Sampled:
    """Of queries first to n - 1."""
    starts = torch.arange(first // block, -(-n // block), device=device) * block
    stops = (starts + block).clamp_max(n)
    starts = starts.clamp_min(first)
    picks = torch.arange(1, count + 1, device=device) * (stops - starts)[:, None] // count - 1
    rows = (starts[:, None] + picks.clamp_min(0)).int()
    return _Sampled(rows, F.pad(rows.diff(dim=1) != 0, (1, 0), value=True), stops.int())


def antidiagonal_blocks(atom: AntidiagonalBlocks, sequence: SequenceQK) -> Chosen:
    """Sums of scores along antidiagonals of stride x stride squares, softmax over squares, summed over key blocks."""
    if fused.serves_heads(sequence.q):
        table = _fused_antidiagonals(atom, sequence)
    else:
        table = fewest_with_mass(_antidiagonals(atom, sequence), sequence.mass(atom.mass))
    return Chosen(table=table, block=atom.block, keys=atom.block)


def _fused_antidiagonals(atom: AntidiagonalBlocks, sequence: SequenceQK) -> Tensor:
    from attnsieve.selection.fused.masses import Sums, by_block
    from attnsieve.selection.fused.rows import ProbedRows

    squares, first, width = atom.block // atom.stride, sequence.first_row // atom.block, -(-sequence.tokens // atom.block)

    def choose(part: slice) -> Tensor:
        own = range((first + part.start) * squares, (first + part.stop) * squares)
        probed = ProbedRows.of_squares(sequence, own, atom.stride)
        mass = by_block(probed, sequence.k, squares, Sums(squares, sequence.together))
        return fewest_with_mass(mass, sequence.mass(atom.mass))

    return _in_parts(sequence, width - first, width, sequence.q.shape[1] * squares * width, choose).whole()


def _antidiagonals(atom: AntidiagonalBlocks, sequence: SequenceQK) -> Tensor:
    """float32 [S, C, rows of blocks, key blocks]."""
    block, stride, n = atom.block, atom.stride, sequence.tokens
    front, back = sequence.first_row % block, -n % block
    q = F.pad(sequence.q.float(), (0, 0, front, back)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    k = F.pad(sequence.k.float(), (0, 0, 0, back)).unflatten(2, (-1, stride)).flatten(3)
    key = torch.arange(k.shape[2], device=q.device)
    row = key[-q.shape[2] :]
    scores = sequence.scores(q, k.mT) / stride
    weights = sequence.merged(scores.masked_fill_(key > row[:, None], -torch.inf).softmax(-1))
    # Squares of padding, before the call's first query and after its last.
    asked = (row >= sequence.first_row // stride) & (row < -(-n // stride))
    mass: Tensor = _sum_keys(weights * asked[:, None], block // stride).unflatten(2, (-1, block // stride)).sum(3)
    return mass


def pooled_blocks(atom: PooledBlocks, sequence: SequenceQK) -> Chosen:
    """Weights of pooled keys against pooled queries, relative to the largest of the row of blocks."""
    scores, causal = _pooled_scores(sequence, atom.block)
    weights = sequence.merged((scores - scores.amax(-1, keepdim=True)).exp())
    return Chosen(table=(weights >= atom.ratio) & causal, block=atom.block, keys=atom.block)


def top_blocks(atom: TopBlocks, sequence: SequenceQK) -> Chosen:
    """The largest pooled scores of every row of blocks."""
    scores, causal = _pooled_scores(sequence, atom.block)
    scores = sequence.merged(scores)
    best = scores.topk(min(atom.count, scores.shape[-1]), dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return Chosen(table=kept & causal, block=atom.block, keys=atom.block)


def _pooled_scores(sequence: SequenceQK, block: int) -> tuple[Tensor, Tensor]:
    """float32 [S, K, H // K, rows, nb], -inf for key blocks after the query block; and bool [rows, nb], which are not."""
    q, k = _pool(sequence.q, block, sequence.first_row), _pool(sequence.k, block, 0)
    number = torch.arange(k.shape[2], device=k.device)
    causal = number <= number[-q.shape[2] :, None]
    return sequence.scores(q, k.mT).masked_fill_(~causal, -torch.inf), causal


def _pool(x: Tensor, block: int, first: int) -> Tensor:
    """Mean per block of rows at positions first, first + 1, ...: float32 [S, H, blocks with rows, D]."""
    stop = first + x.shape[2]
    front, back = first % block, -stop % block
    padded = F.pad(x, (0, 0, front, back)) if front or back else x
    start = torch.arange(first // block * block, stop, block, device=x.device)
    count = (start + block).clamp_max(stop) - start.clamp_min(first)
    mean: Tensor = padded.unflatten(2, (-1, block)).sum(3, dtype=torch.float32) / count[:, None]
    return mean


def _sum_keys(attention: Tensor, block: int) -> Tensor:
    """[..., n] -> [..., nb]: attention summed over key blocks."""
    short = -attention.shape[-1] % block
    by_block: Tensor = F.pad(attention, (0, short)).unflatten(-1, (-1, block)).sum(-1)
    return by_block
