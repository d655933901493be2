"""Which heads carry which atom: worked out once per row of patterns, with the index tensors that a device needs.

Atoms that differ by their mass alone look at the same scores, so heads that carry one of them each choose together, in one launch of
every kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import CallAtom, DynamicAtom
from attnsieve.selection.memo import once_per_row
from attnsieve.selection.sequence import SequenceQK, shares_of


@dataclass(frozen=True)
class Carrier:
    """One atom and its heads. masses: those of its choices where they differ, else None. query, key: head numbers in q and k that are
    read, None for all. target: heads of the layout that keep what is chosen, None for all; each choice is for `repeat` of them in
    turn."""

    atom: CallAtom
    masses: tuple[float, ...] | None
    together: bool
    query: tuple[int, ...] | None
    key: tuple[int, ...] | None
    target: tuple[int, ...] | None
    repeat: int

    def read(self, q: Tensor, k: Tensor, scale: float) -> SequenceQK:
        """What the atom chooses from, of q [S, Hq, nq, D] and k [S, Hkv, nk, D]."""
        masses = None if self.masses is None else shares_of(self.masses, q.device)
        return SequenceQK(take(q, self.query), take(k, self.key), scale, self.together, masses)


@once_per_row
def per_group(patterns: tuple[Pattern, ...], group: int) -> bool:
    """Whether the query heads of every KV group share one mask: the same pattern, whose atoms choose for the group."""
    alike = all(len(set(patterns[start : start + group])) == 1 for start in range(0, len(patterns), group))
    return alike and not any(_per_head(atom) for pattern in patterns for atom in pattern)


@once_per_row
def carriers(patterns: tuple[Pattern, ...], group: int) -> tuple[Carrier, ...]:
    """The carriers of one layer's patterns, one per query head.

    Raises UserError where query heads of a KV group are to choose together but do not all carry the atom, and where a dynamic atom
    is joined to rules that start at a later row.
    """
    late = [pattern for pattern in patterns if pattern.dynamic and pattern.corner_rows]
    require(
        not late, f"{late[:1]} joins a dynamic atom to captured rows or a start row: use columns and diagonals without start"
    )
    shared = per_group(patterns, group)
    atoms = dict.fromkeys(atom for pattern in patterns for atom in pattern if isinstance(atom, CallAtom))
    for atom in atoms:
        _check_groups(atom, _heads_of(atom, patterns), group)
    return tuple(_carrier(alike, patterns, group, shared) for alike in _alike(atoms, patterns))


def _heads_of(atom: CallAtom, patterns: tuple[Pattern, ...]) -> list[int]:
    return [h for h, pattern in enumerate(patterns) if atom in pattern.atoms]


def _check_groups(atom: CallAtom, heads: list[int], group: int) -> None:
    whole = len(heads) == group * len({h // group for h in heads})
    require(
        whole or not _is_together(atom),
        f"{atom} chooses for whole KV groups of {group} query heads: give it to all heads of a group",
    )


def _is_together(atom: CallAtom) -> bool:
    return isinstance(atom, DynamicAtom) and atom.share == "kv"


def _alike(atoms: Iterable[CallAtom], patterns: tuple[Pattern, ...]) -> list[dict[int, CallAtom]]:
    """Atoms by the heads that carry them, those in one that differ by their mass alone; no head carries two of one."""
    found: list[dict[int, CallAtom]] = []
    for atom in atoms:
        heads = _heads_of(atom, patterns)
        fits = (
            each for each in found if _but_mass(next(iter(each.values()))) == _but_mass(atom) and each.keys().isdisjoint(heads)
        )
        into = next(fits, None)
        if into is None:
            found.append(into := {})
        into.update(dict.fromkeys(heads, atom))
    return found


def _but_mass(atom: CallAtom) -> CallAtom:
    alike: Any = atom
    return replace(alike, mass=1.0) if hasattr(atom, "mass") else atom


def _carrier(alike: dict[int, CallAtom], patterns: tuple[Pattern, ...], group: int, shared: bool) -> Carrier:
    heads = sorted(alike)
    atom = alike[heads[0]]
    groups = sorted({h // group for h in heads})
    whole = len(heads) == group * len(groups)
    together = _is_together(atom)
    kv_heads = len(patterns) // group
    masses = tuple(getattr(alike[h], "mass", 1.0) for h in (heads[::group] if together else heads))
    key = _unless_all(groups, kv_heads) if whole else tuple(h // group for h in heads)
    target = _unless_all(groups, kv_heads) if shared else _unless_all(heads, len(patterns))
    repeat = group if together and not shared else 1
    own_masses = masses if len(set(masses)) > 1 else None
    return Carrier(atom, own_masses, together, _unless_all(heads, len(patterns)), key, target, repeat)


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
