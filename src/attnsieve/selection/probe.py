"""Columns and offsets from a probe: the exact attention of a few queries against all keys, O(probe * n) per head."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.dam.boxcox import at_least, cut
from attnsieve.patterns import FOREVER
from attnsieve.patterns.dynamic import DamOnline, VerticalSlash
from attnsieve.selection.sequence import Chosen, SequenceQK, fewest_with_mass

# The paper's Box-Cox settings (section 4.2 and appendix B).
LAMBDA, EPSILON = 0.5, 1e-10


def probe_rows(sequence: SequenceQK, probe: int, strided: int) -> Tensor:
    """int64 [P]: the last `probe` query positions, and `strided` more spread evenly over the queries before them."""
    stop = sequence.k.shape[1]
    first = max(sequence.first_row, stop - probe)
    rows = torch.arange(first, stop, device=sequence.q.device)
    earlier = min(strided, first - sequence.first_row)
    if earlier:
        spread = torch.linspace(sequence.first_row, first - 1, earlier, device=rows.device).long()
        rows = torch.cat([spread, rows])
    return rows


def vertical_slash(atom: VerticalSlash, sequence: SequenceQK) -> Chosen:
    """Every probe cell is counted for its column or its offset, whichever holds more; then the fewest with the mass."""
    rows = probe_rows(sequence, atom.probe, atom.strided)
    attention = sequence.attention(rows)
    by_distance = _by_distance(attention, rows)
    column, offset = attention.sum(1), by_distance.sum(1)
    distance = _distance(rows, attention.shape[-1])
    for_column = column[:, None, :] >= offset.unsqueeze(1).expand_as(attention).gather(2, distance.expand_as(attention))
    column_share = (attention * for_column).sum(1)
    offset_share = _by_distance(attention * ~for_column, rows).sum(1)
    kept = fewest_with_mass(torch.cat([column_share, offset_share], dim=-1), atom.mass)
    columns, offsets = kept.split(attention.shape[-1], dim=-1)
    return Chosen(end=_forever(columns), offset=offsets)


def dam_online(atom: DamOnline, sequence: SequenceQK) -> Chosen:
    """DAM's threshold and matching on the probe's rows."""
    rows = probe_rows(sequence, atom.probe, atom.strided)
    attention = sequence.attention(rows)
    keys = torch.arange(attention.shape[-1], device=rows.device)
    true_mask = at_least(attention, cut(atom.tau, LAMBDA, EPSILON)) & (keys <= rows[:, None])
    reach = (keys <= rows[:, None]).sum(0)
    columns = true_mask.sum(1) >= atom.mu * reach
    offsets = _by_distance(true_mask, rows).sum(1) >= atom.mu * reach
    return Chosen(end=_forever(columns), offset=offsets)


def _distance(rows: Tensor, n: int) -> Tensor:
    """int64 [P, n]: distance of every key from every probe row, clamped to the causal range."""
    return (rows[:, None] - torch.arange(n, device=rows.device)).clamp(0, n - 1)


def _by_distance(cells: Tensor, rows: Tensor) -> Tensor:
    """[H, P, n] by key -> [H, P, n] by distance, 0 where the distance reaches before the text."""
    distance = rows[:, None] - torch.arange(cells.shape[-1], device=rows.device)
    moved = cells.gather(2, distance.clamp_min(0).expand_as(cells))
    return moved.masked_fill(distance < 0, 0)


def _forever(kept: Tensor) -> Tensor:
    return torch.where(kept, FOREVER, 0).to(torch.int32)
