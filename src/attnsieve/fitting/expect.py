"""What a rule would cost and keep, from what profiling saw: no model, no n x n work beyond the mean maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.profiling import Profile


@dataclass(frozen=True)
class Observed:
    """One layer, as S profiles saw it. P: their capture length; n: the longest length they probed, P where there is none.

    maps: float32 [S, H, P, P]. column_mass, offset_mass: float64 [S, H, n], mass per row over rows P .. n - 1.
    """

    maps: Tensor
    column_mass: Tensor
    offset_mass: Tensor

    @classmethod
    def of(cls, profiles: Sequence[Profile], layer: int) -> Observed:
        """Needs profiles with maps, of equal capture lengths and longest lengths."""
        maps = torch.stack([profile.maps[layer] for profile in profiles if profile.maps is not None])
        if not profiles[0].long:
            nothing = torch.zeros(maps.shape[:-1], dtype=torch.float64)
            return cls(maps, nothing, nothing)
        longest = [profile.long[-1] for profile in profiles]
        columns, offsets = (
            torch.stack([getattr(long, name)[layer].double() / long.rows for long in longest])
            for name in ("column_mass", "offset_mass")
        )
        return cls(maps, columns, offsets)

    @property
    def heads(self) -> int:
        return self.maps.shape[1]

    @property
    def pcl(self) -> int:
        return self.maps.shape[-1]

    @property
    def length(self) -> int:
        return self.column_mass.shape[-1]

    def cells(self) -> Tensor:
        """float64 [n]: rows i >= P that can read key c, which are as many as there are pairs at distance c in those rows."""
        return (self.length - torch.arange(self.length).clamp_min(self.pcl)).double()

    def pairs(self, columns: Tensor, offsets: Tensor) -> Tensor:
        """float64 [H]: pairs in rows from P on of the columns and offsets (bool [H, n]), each pair once. Exact."""
        cells = self.cells()
        twice = torch.where(columns, self._of_column(offsets.double()), 0.0).sum(-1)
        return columns.double() @ cells + offsets.double() @ cells - twice

    def mass(self, columns: Tensor, offsets: Tensor) -> Tensor:
        """float64 [S, H]: share of mass that columns and offsets (bool [H, n]) keep in rows from P on.

        Exact where no pair is both. The profile holds no joint masses, so pairs that are both are taken to hold the mean mass
        of their column, which is right for sinks, or of their distances, right near the diagonal, whichever is more.
        """
        cells = self.cells()
        by_column = self.column_mass / cells * self._of_column(offsets.double())
        by_offset = self._of_column(torch.where(offsets, self.offset_mass / cells, 0.0))
        twice = torch.minimum(torch.maximum(by_column, by_offset), self.column_mass)
        kept = torch.where(columns, self.column_mass - twice, 0.0).sum(-1)
        return (kept + torch.where(offsets, self.offset_mass, 0.0).sum(-1)).clamp(0, 1)

    def _of_column(self, per_offset: Tensor) -> Tensor:
        """[..., n]: for each column c, `per_offset` summed over the distances of its rows P <= i < n."""
        total = torch.nn.functional.pad(per_offset.cumsum(-1), (1, 0))
        columns = torch.arange(self.length)
        return total[..., self.length - columns] - total[..., (self.pcl - columns).clamp_min(0)]


@dataclass(frozen=True)
class Expectation:
    """float64 [H]: share of causal pairs kept at n positions; share of mass kept in rows below P, from P on, and in all.

    Masses are those in the profile that a head's rule serves least.
    """

    density: Tensor
    below: Tensor
    beyond: Tensor
    retained: Tensor


def expect(observed: Observed, mask: Tensor, columns: Tensor, offsets: Tensor) -> Expectation:
    """Of one rule per head: mask, bool [H, P, P], in rows below P, and columns and offsets, bool [H, n], from P on.

    density is exact, below too for the calibration text, beyond as exact as `Observed.mass`. Without long statistics n = P, and
    beyond is 1.
    """
    pcl, n = observed.pcl, observed.length
    below = ((observed.maps * mask).sum((-2, -1), dtype=torch.float64) / pcl).clamp_max(1)
    beyond = observed.mass(columns, offsets) if n > pcl else torch.ones_like(below)
    pairs = mask.sum((-2, -1)).double() + observed.pairs(columns, offsets)
    retained = (below * pcl + beyond * (n - pcl)) / n
    return Expectation(pairs / (n * (n + 1) / 2), below.amin(0), beyond.amin(0), retained.amin(0))
