"""Which heads carry which atom: worked out once per row of patterns, with the index tensors that a device needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import CallAtom, DynamicAtom
from attnsieve.selection.memo import once_per_row
from attnsieve.selection.sequence import SequenceQK


@dataclass(frozen=True)
class Carrier:
    """One atom and its heads. query, key: head numbers in q and k that are read, None for all. target: heads of the layout that
    keep what is chosen, None for all; each choice is for `repeat` of them in turn."""

    atom: CallAtom
    together: bool
    query: tuple[int, ...] | None
    key: tuple[int, ...] | None
    target: tuple[int, ...] | None
    repeat: int

    def read(self, q: Tensor, k: Tensor, scale: float) -> SequenceQK:
        """What the atom chooses from, of q [S, Hq, nq, D] and k [S, Hkv, nk, D]."""
        return SequenceQK(take(q, self.query), take(k, self.key), scale, self.together)


def per_group(patterns: Sequence[Pattern], group: int) -> bool:
    """Whether the query heads of every KV group share one mask: the same pattern, whose atoms choose for the group."""
    alike = all(len(set(patterns[start : start + group])) == 1 for start in range(0, len(patterns), group))
    return alike and not any(_per_head(atom) for pattern in patterns for atom in pattern)


@once_per_row
def carriers(patterns: tuple[Pattern, ...], group: int) -> tuple[Carrier, ...]:
    """The carriers of one layer's patterns, one per query head.

    Raises UserError where query heads of a KV group are to choose together but do not all carry the atom.
    """
    shared = per_group(patterns, group)
    atoms = dict.fromkeys(atom for pattern in patterns for atom in pattern if isinstance(atom, CallAtom))
    return tuple(_carrier(atom, patterns, group, shared) for atom in atoms)


def _carrier(atom: CallAtom, patterns: tuple[Pattern, ...], group: int, shared: bool) -> Carrier:
    heads = [h for h, pattern in enumerate(patterns) if atom in pattern.atoms]
    groups = sorted({h // group for h in heads})
    whole = len(heads) == group * len(groups)
    together = isinstance(atom, DynamicAtom) and atom.share == "kv"
    require(
        whole or not together, f"{atom} chooses for whole KV groups of {group} query heads: give it to all heads of a group"
    )
    kv_heads = len(patterns) // group
    key = _unless_all(groups, kv_heads) if whole else tuple(h // group for h in heads)
    target = _unless_all(groups, kv_heads) if shared else _unless_all(heads, len(patterns))
    return Carrier(atom, together, _unless_all(heads, len(patterns)), key, target, group if together and not shared else 1)


def _per_head(atom: object) -> bool:
    return isinstance(atom, DynamicAtom) and atom.share == "none"


def _unless_all(heads: list[int], count: int) -> tuple[int, ...] | None:
    return None if len(heads) == count else tuple(heads)


def take(x: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """x [S, H, ...] at `heads`, without a copy if they are all."""
    return x if heads is None else x.index_select(1, index_of(heads, x.device))


@lru_cache(maxsize=1024)
def index_of(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [heads] on the device: copied there once, since a copy waits for the device."""
    return torch.tensor(heads, device=device)
