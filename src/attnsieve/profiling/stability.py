"""Stability: how much the masks that different documents give differ, per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint

# A mask that keeps more than this serves every text by keeping nearly everything.
MOST_DENSITY = 0.5


@dataclass(frozen=True, eq=False)
class Stability:
    """Masks made from D documents (or kinds of text) each, tried on one another.

    names: what they are called. overlap: float32 [D, D, layers, heads], the Jaccard index of two masks' pairs below the capture
    length. retained: float32 [D, D, layers, heads], the share of document b's attention mass that document a's mask keeps, at
    `length` tokens. density: float32 [D, layers, heads], share of causal pairs.
    """

    fingerprint: Fingerprint
    names: tuple[str, ...]
    length: int
    overlap: Tensor
    retained: Tensor
    density: Tensor

    def __post_init__(self) -> None:
        count = len(self.names)
        shape = (count, count, self.fingerprint.layers, self.fingerprint.heads)
        require(count >= 2, f"stability compares at least two documents, got {count}")
        require(self.overlap.shape == self.retained.shape == shape, f"overlap and retained must be {shape}")

    def mean_overlap(self) -> Tensor:
        """float32 [layers, heads]: over pairs of different documents."""
        return self._others(self.overlap).mean(0)

    def own(self) -> Tensor:
        """float32 [layers, heads]: mass that masks keep of the documents they were made from, mean over documents."""
        return self.retained.diagonal().mean(-1)

    def worst(self) -> Tensor:
        """float32 [layers, heads]: mass that a mask keeps of another document, in the worst pair."""
        return self._others(self.retained).amin(0)

    def fixed(self, floor: float = 0.9) -> Tensor:
        """bool [layers, heads]: heads that a fixed mask can serve: every document's mask keeps `floor` of every other's mass,
        and leaves out at least half of the pairs."""
        return (self.worst() >= floor) & (self.density.amax(0) <= MOST_DENSITY)

    def _others(self, values: Tensor) -> Tensor:
        different = ~torch.eye(len(self.names), dtype=torch.bool)
        return values[different]
