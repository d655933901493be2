"""Columns and offsets from a probe: the exact attention of a few queries against all keys, O(probe * n) per head."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attnsieve.dam.boxcox import EPS, LAM, at_least, cut, rounded_up
from attnsieve.device import PerStream
from attnsieve.patterns import FOREVER
from attnsieve.patterns.dynamic import DamOnline, VerticalSlash
from attnsieve.selection import fused
from attnsieve.selection.sequence import Chosen, SequenceQK, fewest_with_mass


def probe_rows(sequence: SequenceQK, probe: int, strided: int = 0) -> Tensor:
    """int32 [P]: the last `probe` query positions, and `strided` more spread evenly over the queries before them."""
    return _rows(sequence.q, sequence.first_row, sequence.tokens, probe, strided)


@PerStream
def _rows(device: torch.device, begin: int, stop: int, probe: int, strided: int) -> Tensor:
    first = max(begin, stop - probe)
    rows = torch.arange(first, stop, dtype=torch.int32, device=device)
    earlier = min(strided, first - begin)
    if earlier:
        rows = torch.cat([torch.linspace(begin, first - 1, earlier, device=device).int(), rows])
    return rows


def vertical_slash(atom: VerticalSlash, sequence: SequenceQK) -> Chosen:
    """Every probe cell is counted for its column or its offset, whichever holds more; then the fewest with the mass."""
    column, offset = _fused_shares(atom, sequence) if fused.serves_heads(sequence.q) else _shares(atom, sequence)
    weights = torch.cat([column, offset if atom.band == 1 else band_means(offset, atom.band)], dim=-1)
    columns, offsets = fewest_with_mass(weights, sequence.mass(atom.mass)).split(sequence.tokens, dim=-1)
    return Chosen(end=forever(columns), offset=offsets if atom.band == 1 else whole_bands(offsets, atom.band))


def band_means(values: Tensor, band: int) -> Tensor:
    """[..., n] with every value replaced by the mean of its band: `band` neighbours, fewer in the last."""
    n = values.shape[-1]
    sums = _by_band(values, band).sum(-1)
    size = (n - torch.arange(0, n, band, device=values.device)).clamp_max(band)
    return _spread(sums / size, band, n)


def whole_bands(kept: Tensor, band: int) -> Tensor:
    """bool [..., n]: all of a band of which anything is kept."""
    return _spread(_by_band(kept, band).any(-1), band, kept.shape[-1])


def _by_band(values: Tensor, band: int) -> Tensor:
    padded: Tensor = F.pad(values, (0, -values.shape[-1] % band)).unflatten(-1, (-1, band))
    return padded


def _spread(bands: Tensor, band: int, n: int) -> Tensor:
    return bands.repeat_interleave(band, dim=-1)[..., :n]


def _shares(atom: VerticalSlash, sequence: SequenceQK) -> tuple[Tensor, Tensor]:
    probe = probed(sequence, atom.probe, atom.strided)
    column, offset = probe.by_key(probe.cells), probe.by_distance(probe.cells)
    for_column = column.unsqueeze(-2) >= probe.of_distance(offset)
    of_columns, of_offsets = probe.by_key(probe.cells * for_column), probe.by_distance(probe.cells * ~for_column)
    return of_columns[..., -sequence.tokens :], of_offsets


def _fused_shares(atom: VerticalSlash, sequence: SequenceQK) -> tuple[Tensor, Tensor]:
    from attnsieve.selection.fused.slash import larger_shares

    rows = probe_rows(sequence, atom.probe, atom.strided)
    return larger_shares(sequence, rows, min(atom.probe, sequence.q.shape[2]))


def dam_online(atom: DamOnline, sequence: SequenceQK) -> Chosen:
    """DAM's threshold and matching on the probe's rows."""
    threshold, rows = cut(atom.tau, LAM, EPS), probe_rows(sequence, atom.probe, atom.strided)
    if fused.serves_heads(sequence.q):
        from attnsieve.selection.fused.slash import counts

        column, offset = counts(sequence, rows, min(atom.probe, sequence.q.shape[2]), rounded_up(threshold, torch.float32))
    else:
        probe = probed(sequence, atom.probe, atom.strided)
        # Cells that no query reads hold 0, which passes a threshold of 0 alone.
        true_mask = (at_least(probe.cells, threshold) & probe.causal).float()
        column, offset = probe.by_key(true_mask)[..., -sequence.tokens :], probe.by_distance(true_mask)
    # As many rows read key x as have a key at distance x.
    enough = atom.mu * (rows[:, None] >= torch.arange(sequence.tokens, device=rows.device)).sum(0)
    return Chosen(end=forever(column >= enough), offset=offset >= enough)


def probed(sequence: SequenceQK, probe: int, strided: int) -> Probe:
    """The attention of the last `probe` queries, and of `strided` more spread evenly over the queries before them."""
    rows = probe_rows(sequence, probe, strided)
    if strided:
        return ScatteredRows(sequence.attention(rows), rows)
    return LastRows(sequence.attention(rows.flip(0), seen=sequence.tokens - len(rows)))


class Probe(Protocol):
    """Attention cells of some queries. cells: float32 [S, C, P, W], key j in column W - n + j; causal: bool [P, W], which of them
    can be read."""

    cells: Tensor
    causal: Tensor

    def by_key(self, cells: Tensor) -> Tensor:
        """[..., P, W] -> [..., W]: sums of columns."""

    def by_distance(self, cells: Tensor) -> Tensor:
        """[..., P, W] -> [..., n]: sums of the cells at each distance."""

    def of_distance(self, values: Tensor) -> Tensor:
        """[S, C, n] -> [S, C, P, W]: the value of every cell's distance."""


class ScatteredRows:
    """Queries at any positions; W = n."""

    def __init__(self, attention: Tensor, rows: Tensor) -> None:
        self.cells = attention
        self._distance = rows[:, None] - torch.arange(attention.shape[-1], device=rows.device)
        self.causal = self._distance >= 0

    def by_key(self, cells: Tensor) -> Tensor:
        return cells.sum(-2)

    def by_distance(self, cells: Tensor) -> Tensor:
        # Key and distance mirror each other within a row: the same gather leads from one to the other.
        return self._mirrored(cells).masked_fill(~self.causal, 0).sum(-2)

    def of_distance(self, values: Tensor) -> Tensor:
        return self._mirrored(values.unsqueeze(-2).expand_as(self.cells))

    def _mirrored(self, cells: Tensor) -> Tensor:
        return cells.gather(-1, self._distance.clamp_min(0).expand_as(cells))


class LastRows:
    """The last P queries, latest first, with P columns of zeros before the keys: W = n + P.

    Cells of equal distance then lie on lines that a view with other strides straightens, so nothing is moved.
    """

    def __init__(self, attention: Tensor) -> None:
        rows, n = attention.shape[-2:]
        self._rows, self._keys = rows, n
        self.cells = F.pad(attention, (rows, 0))
        row, column = (torch.arange(size, device=attention.device) for size in (rows, n + rows))
        self.causal = (column >= rows) & (column < n + rows - row[:, None])

    def by_key(self, cells: Tensor) -> Tensor:
        return cells.sum(-2)

    def by_distance(self, cells: Tensor) -> Tensor:
        # Row r, distance d: key n - 1 - r - d, column P + n - 1 - r - d.
        cells = cells.contiguous()
        strides = (*cells.stride()[:-2], cells.stride(-2) - 1, 1)
        lines = cells.as_strided((*cells.shape[:-1], self._keys), strides, cells.storage_offset() + self._rows)
        return lines.sum(-2).flip(-1)

    def of_distance(self, values: Tensor) -> Tensor:
        rows, padded = self._rows, F.pad(values.flip(-1), (self._rows, self._rows))
        return padded.as_strided((*values.shape[:-1], rows, self._keys + rows), (*padded.stride()[:-1], 1, 1))


def forever(kept: Tensor) -> Tensor:
    """int32: ends of keys that all rows see, 0 for the others."""
    return kept.int().mul_(FOREVER)
