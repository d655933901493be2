"""The captured corner: DAM's true mask, one bit per pair below the pattern capture length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.patterns.base import Atom


def pack_bits(mask: np.ndarray | Tensor) -> np.ndarray:
    """bool [..., L] -> uint8 [..., ceil(L / 8)], the first key in the lowest bit."""
    return np.packbits(np.asarray(mask, dtype=bool), axis=-1, bitorder="little")


def unpack_bits(bits: np.ndarray, length: int) -> np.ndarray:
    """uint8 [..., ceil(length / 8)] -> bool [..., length]; the inverse of `pack_bits`."""
    return np.unpackbits(bits, axis=-1, count=length, bitorder="little").astype(bool)


@dataclass(frozen=True, repr=False)
class Captured(Atom):
    """Keep the captured pairs in rows below `length`, nothing beyond (DAM's true mask, arXiv 2506.11104 eq. 4).

    Spelled by length and digest; the bits (uint8 [length, ceil(length / 8)]) travel beside the text.
    """

    length: int
    digest: str
    bits: np.ndarray = field(compare=False)
    name = "captured"

    def __post_init__(self) -> None:
        shape = (self.length, -(-self.length // 8))
        require(
            self.bits.dtype == np.uint8 and self.bits.shape == shape,
            f"captured({self.length}) needs uint8 bits of shape {shape}, got {self.bits.dtype} {self.bits.shape}",
        )
        actual = corner_digest(self.bits)
        require(
            self.digest == actual, f"captured bits have digest {actual}, the text says {self.digest}: wrong or changed bits"
        )

    @classmethod
    def from_mask(cls, mask: np.ndarray | Tensor) -> Captured:
        """From bool [L, L]. Raises UserError unless it is square and all cells above the diagonal are False."""
        dense = np.asarray(mask, dtype=bool)
        require(dense.ndim == 2 and dense.shape[0] == dense.shape[1] > 0, f"a true mask is square, got shape {dense.shape}")
        require(not np.triu(dense, 1).any(), "a true mask is causal: it keeps keys after their query")
        bits = pack_bits(dense)
        return cls(len(dense), corner_digest(bits), bits)

    def mask(self) -> Tensor:
        """bool [length, length]."""
        return torch.from_numpy(unpack_bits(self.bits, self.length))

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        bits, last = torch.from_numpy(self.bits).to(i.device), self.length - 1
        key = j.clamp(0, last)
        kept = bits[i.clamp(0, last), key // 8] >> (key % 8) & 1 > 0
        return kept & (i < self.length) & (j < self.length)

    @property
    def corner_rows(self) -> int:
        return self.length

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.length, self.digest], {}


def corner_digest(bits: np.ndarray) -> str:
    """16 hex digits that name captured bits."""
    return hashlib.sha256(np.ascontiguousarray(bits).tobytes()).hexdigest()[:16]
