"""What a rule would cost and keep, from what profiling saw: no model, no n x n work beyond the mean maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.profiling import Profile


@dataclass(frozen=True)
class Observed:
    """One layer of a profile. P: the profile's capture length; n: the longest probed length, or P where there is none.

    maps: float32 [H, P, P]. column_mass, offset_mass: float64 [H, n], mass per row over rows P .. n - 1.
    """

    maps: Tensor
    column_mass: Tensor
    offset_mass: Tensor

    @classmethod
    def of(cls, profile: Profile, layer: int) -> Observed:
        """Needs a profile with maps."""
        assert profile.maps is not None
        maps = profile.maps[layer]
        if not profile.long:
            nothing = torch.zeros(maps.shape[0], profile.pcl, dtype=torch.float64)
            return cls(maps, nothing, nothing)
        long = profile.long[-1]
        return cls(maps, long.column_mass[layer].double() / long.rows, long.offset_mass[layer].double() / long.rows)

    @property
    def pcl(self) -> int:
        return self.maps.shape[-1]

    @property
    def length(self) -> int:
        return self.column_mass.shape[-1]

    def rows_of_column(self) -> Tensor:
        """int64 [n]: rows i >= P that can read key c."""
        return self.length - torch.arange(self.length).clamp_min(self.pcl)

    def beside(self, columns: Tensor) -> Tensor:
        """float64 [H, n]: mass per offset outside the kept `columns` (bool [H, n]), rows P .. n - 1.

        The profile holds no joint masses, so a column's mass is taken as even over its rows, which it is for sinks.
        """
        rate = torch.where(columns, self.column_mass / self.rows_of_column(), 0.0)
        return (self.offset_mass - self._per_offset(rate)).clamp_min(0)

    def _per_offset(self, per_column: Tensor) -> Tensor:
        """[H, n]: for each offset r, `per_column` summed over the columns c whose cell (c + r, c) has P <= c + r < n."""
        total = torch.nn.functional.pad(per_column.cumsum(-1), (1, 0))
        offsets = torch.arange(self.length)
        return total[..., self.length - offsets] - total[..., (self.pcl - offsets).clamp_min(0)]

    def pairs(self, columns: Tensor, offsets: Tensor) -> Tensor:
        """float64 [H]: pairs in rows P .. n - 1 of the columns and offsets (bool [H, n]), each pair once. Exact."""
        cells = self.rows_of_column().double()
        twice = torch.where(offsets, self._per_offset(columns.double()), 0.0).sum(-1)
        return columns.double() @ cells + offsets.double() @ cells - twice


@dataclass(frozen=True)
class Expectation:
    """float64 [H]: share of causal pairs kept at n positions; share of mass kept in rows below P, from P on, and in all."""

    density: Tensor
    below: Tensor
    beyond: Tensor
    retained: Tensor


def expect(observed: Observed, mask: Tensor, columns: Tensor, offsets: Tensor) -> Expectation:
    """Of one rule per head: mask, bool [H, P, P], in rows below P, and columns and offsets, bool [H, n], from P on.

    density and below are exact (the latter over the calibration text); beyond as exact as `Observed.beside`. Without long
    statistics n = P, and beyond is 1.
    """
    pcl, n = observed.pcl, observed.length
    below = (observed.maps * mask).sum((-2, -1), dtype=torch.float64) / pcl
    pairs = mask.sum((-2, -1)).double() + observed.pairs(columns, offsets)
    columns_kept = torch.where(columns, observed.column_mass, 0.0).sum(-1)
    offsets_kept = torch.where(offsets, observed.beside(columns), 0.0).sum(-1)
    beyond = (columns_kept + offsets_kept).clamp_max(1) if n > pcl else torch.ones_like(below)
    below = below.clamp_max(1)
    return Expectation(pairs / (n * (n + 1) / 2), below, beyond, (below * pcl + beyond * (n - pcl)) / n)
