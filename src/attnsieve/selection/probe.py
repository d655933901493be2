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


def probe_rows(sequence: SequenceQK, probe: int, strided: int = 0) -> Tensor:
    """int64 [P]: the last `probe` query positions, and `strided` more spread evenly over the queries before them."""
    first = max(sequence.first_row, sequence.tokens - probe)
    rows = torch.arange(first, sequence.tokens, device=sequence.q.device)
    earlier = min(strided, first - sequence.first_row)
    if earlier:
        spread = torch.linspace(sequence.first_row, first - 1, earlier, device=rows.device).long()
        rows = torch.cat([spread, rows])
    return rows


def vertical_slash(atom: VerticalSlash, sequence: SequenceQK) -> Chosen:
    """Every probe cell is counted for its column or its offset, whichever holds more; then the fewest with the mass."""
    rows = probe_rows(sequence, atom.probe, atom.strided)
    attention = sequence.attention(rows)
    distance = rows[:, None] - torch.arange(sequence.tokens, device=rows.device)
    column, offset = attention.sum(-2), _by_distance(attention, distance).sum(-2)
    # What the offset of every cell holds: the same gather, since key and distance mirror each other within a row.
    of_cell = offset.unsqueeze(-2).expand_as(attention).gather(-1, distance.clamp_min(0).expand_as(attention))
    for_column = column.unsqueeze(-2) >= of_cell
    column_share = (attention * for_column).sum(-2)
    offset_share = _by_distance(attention * ~for_column, distance).sum(-2)
    kept = fewest_with_mass(torch.cat([column_share, offset_share], dim=-1), atom.mass)
    columns, offsets = kept.split(sequence.tokens, dim=-1)
    return Chosen(end=forever(columns), offset=offsets)


def dam_online(atom: DamOnline, sequence: SequenceQK) -> Chosen:
    """DAM's threshold and matching on the probe's rows."""
    rows = probe_rows(sequence, atom.probe, atom.strided)
    attention = sequence.attention(rows)
    distance = rows[:, None] - torch.arange(sequence.tokens, device=rows.device)
    causal = distance >= 0
    true_mask = at_least(attention, cut(atom.tau, LAMBDA, EPSILON)) & causal
    enough = atom.mu * causal.sum(0)
    columns = true_mask.sum(-2) >= enough
    offsets = _by_distance(true_mask, distance).sum(-2) >= enough
    return Chosen(end=forever(columns), offset=offsets)


def forever(kept: Tensor) -> Tensor:
    """int32: ends of keys that all rows see, 0 for the others."""
    return torch.where(kept, FOREVER, 0).to(torch.int32)


def _by_distance(cells: Tensor, distance: Tensor) -> Tensor:
    """[..., P, n] by key -> [..., P, n] by distance, 0 where the distance reaches before the text; distance int64 [P, n]."""
    moved = cells.gather(-1, distance.clamp_min(0).expand_as(cells))
    return moved.masked_fill(distance < 0, 0)
