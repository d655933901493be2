"""Pattern: a length-free rule for one head, a union of atoms with one spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

# The first row that no longer sees a key which is never dropped. Fits int32, the type kernels read.
FOREVER = 2**31 - 1


@dataclass(frozen=True)
class BlockRows:
    """Whole blocks of `size` x `size` tokens, for each row of blocks a list of key blocks.

    count: int64 [rows of blocks]; index: int64 [rows of blocks, widest list], -1 beyond the count.
    """

    size: int
    count: Tensor
    index: Tensor


class Atom:
    """One rule for which keys a query keeps. Causality (j <= i) is added by whoever reads it.

    A static atom knows positions only. `keep` is its definition; `end`, `offsets`, `blocks` and `corner_rows` are the same
    rule in the vector form that layouts are compiled from, and every test compares the two.
    """

    name: ClassVar[str]
    dynamic: ClassVar[bool] = False

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        """True where query position `i` may read key position `j`; int64 tensors that broadcast, bool result."""
        raise NotImplementedError

    def end(self, n: int) -> Tensor | None:
        """int64 [n]: the first row that no longer sees each key, or None where the atom keeps no key by interval."""
        return None

    def offsets(self, n: int) -> Tensor | None:
        """bool [n]: distances i - j that are kept, or None."""
        return None

    def blocks(self, n: int) -> BlockRows | None:
        """Whole blocks that are kept for n positions, or None."""
        return None

    @property
    def corner_rows(self) -> int:
        """Rows below this follow `keep` but not the vectors; 0 for most atoms."""
        return 0

    def merged(self, other: Atom) -> Atom | None:
        """One atom equal to the union of both, or None where there is none. Gives patterns one spelling."""
        return self if self == other else None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the text form."""
        raise NotImplementedError

    def __str__(self) -> str:
        positional, keyword = self.arguments()
        parts = [_spell(value) for value in positional] + [f"{key}={_spell(value)}" for key, value in keyword.items()]
        return f"{self.name}({', '.join(parts)})"

    def __or__(self, other: Atom | Pattern) -> Pattern:
        return Pattern.of(self) | other


def _spell(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class Pattern:
    """A union of atoms: which keys each query of one head keeps, at any length.

    Build with `sink(4) | window(256)`, or `Pattern.parse("sink(4) | window(256)")`. Equal rules have equal text as far as
    the atoms' own merging goes; `Pattern.parse(str(p)) == p` always.
    """

    atoms: tuple[Atom, ...]

    @classmethod
    def of(cls, *atoms: Atom) -> Pattern:
        """The union of `atoms`, merged and in canonical order."""
        merged: list[Atom] = []
        for atom in atoms:
            _absorb(merged, atom)
        return cls(tuple(sorted(merged, key=lambda atom: (atom.name, str(atom)))))

    @classmethod
    def empty(cls) -> Pattern:
        """The rule that keeps nothing: every row gives output 0 and LSE -inf."""
        return cls(())

    @classmethod
    def parse(cls, text: str, corners: Mapping[str, np.ndarray] | None = None) -> Pattern:
        """The pattern spelled by `text`. `corners` maps digests to packed bits, for `captured` atoms.

        Raises UserError that names the offending part and the known atoms.
        """
        from attnsieve.patterns.text import parse_pattern

        return parse_pattern(text, corners or {})

    def __or__(self, other: Atom | Pattern) -> Pattern:
        atoms = other.atoms if isinstance(other, Pattern) else (other,)
        return Pattern.of(*self.atoms, *atoms)

    def __iter__(self) -> Iterator[Atom]:
        return iter(self.atoms)

    def __str__(self) -> str:
        return " | ".join(str(atom) for atom in self.atoms) or "empty()"

    def __repr__(self) -> str:
        return f"Pattern({str(self)!r})"

    @property
    def dynamic(self) -> bool:
        """Whether any atom chooses its keys from q and k of the input."""
        return any(atom.dynamic for atom in self.atoms)

    @property
    def corner_rows(self) -> int:
        """Rows below this need captured bits in a layout."""
        return max((atom.corner_rows for atom in self.atoms), default=0)

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        """True where query position `i` reads key position `j`, causality included. The definition of the rule."""
        kept = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)
        for atom in self.atoms:
            kept |= atom.keep(i, j)
        return kept & (j <= i)


def _absorb(merged: list[Atom], atom: Atom) -> None:
    for place, present in enumerate(merged):
        union = present.merged(atom) or atom.merged(present)
        if union is not None:
            merged.pop(place)
            _absorb(merged, union)
            return
    merged.append(atom)
