"""From the patterns of one layer and its q and k to a Layout, static and dynamic parts joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.layout import Blocks, Layout
from attnsieve.layout import compile as compile_layout
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import (
    AntidiagonalBlocks,
    DamOnline,
    DynamicAtom,
    PooledBlocks,
    ProbedBlocks,
    TopBlocks,
    VerticalSlash,
)
from attnsieve.selection.blocks import antidiagonal_blocks, pooled_blocks, probed_blocks, top_blocks
from attnsieve.selection.probe import dam_online, vertical_slash
from attnsieve.selection.sequence import Chosen, SequenceQK
from attnsieve.spans import Spans

SELECTORS: dict[type[DynamicAtom], Callable[[Any, SequenceQK], Chosen]] = {
    VerticalSlash: vertical_slash,
    DamOnline: dam_online,
    ProbedBlocks: probed_blocks,
    AntidiagonalBlocks: antidiagonal_blocks,
    PooledBlocks: pooled_blocks,
    TopBlocks: top_blocks,
}


def choose(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, *, spans: Spans | None = None, scale: float | None = None
) -> Layout:
    """The layout of this call: one pattern per query head, dynamic atoms resolved from q [B, Hq, Tq, D] and k [B, Hkv, Tk, D].

    The result has one set of masks per sequence of `spans` (default: every batch row is one) and a length of Tk positions.
    Raises UserError where a dynamic atom is joined to rules that start at a later row, and for patterns that do not fit q.
    """
    require(len(patterns) == q.shape[1], f"choose needs one pattern per query head ({q.shape[1]}), got {len(patterns)}")
    for pattern in patterns:
        require(
            not (pattern.dynamic and pattern.corner_rows),
            f"{pattern} joins a dynamic atom to captured rows or a start row: use columns and diagonals without start",
        )
    spans = Spans.full(q.shape[0], q.shape[2], k.shape[2], q.device) if spans is None else spans
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    base = _static_part(tuple(patterns), k.shape[2], q.device)
    per_sequence = [_sequence(patterns, q, k, row, scale) for row in spans.rows()]
    return _join(base, per_sequence) if any(per_sequence) else base


@lru_cache(maxsize=64)
def _static_part(patterns: tuple[Pattern, ...], length: int, device: torch.device) -> Layout:
    static = [Pattern.of(*(atom for atom in pattern if not atom.dynamic)) for pattern in patterns]
    return compile_layout(static, length, device)


def _sequence(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, row: tuple[int, ...], scale: float
) -> list[tuple[list[int], Chosen]]:
    """What every dynamic atom chose for one sequence: (heads, choice)."""
    b, q0, nq, k0, nk = row
    chosen = []
    if nq == 0:
        return []
    for atom in dict.fromkeys(atom for pattern in patterns for atom in pattern if isinstance(atom, DynamicAtom)):
        heads = [h for h, pattern in enumerate(patterns) if atom in pattern.atoms]
        kv_heads = [h // (q.shape[1] // k.shape[1]) for h in heads]
        sequence = SequenceQK(q[b, heads, q0 : q0 + nq].detach(), k[b, kv_heads, k0 : k0 + nk].detach(), scale)
        chosen.append((heads, SELECTORS[type(atom)](atom, sequence)))
    return chosen


def _join(base: Layout, per_sequence: list[list[tuple[list[int], Chosen]]]) -> Layout:
    """The union of the static layout with the choices of every sequence."""
    shape = (len(per_sequence), base.heads, base.length)
    end = base.end.expand(shape).clone()
    offset = torch.zeros(shape, dtype=torch.bool, device=base.device)
    if base.offset is not None:
        offset |= base.offset
    tables = _Tables(base, per_sequence)
    for z, choices in enumerate(per_sequence):
        for heads, chosen in choices:
            if chosen.end is not None:
                n = chosen.end.shape[-1]
                end[z, heads, :n] = torch.maximum(end[z, heads, :n], chosen.end)
            if chosen.offset is not None:
                offset[z, heads, : chosen.offset.shape[-1]] |= chosen.offset
            if chosen.table is not None:
                tables.add(z, heads, chosen)
    kept_offset = offset if base.offset is not None or any(c.offset is not None for s in per_sequence for _, c in s) else None
    return replace(base, end=end, offset=kept_offset, blocks=tables.blocks(), schedules={})


@dataclass
class _Tables:
    """Whole blocks of every sequence and head as one bool table [Z, H, nb, nb], in the finest block size in use."""

    def __init__(self, base: Layout, per_sequence: list[list[tuple[list[int], Chosen]]]) -> None:
        sizes = [chosen.block for choices in per_sequence for _, chosen in choices if chosen.table is not None]
        sizes += [] if base.blocks is None else [base.blocks.size]
        self.size = gcd(*sizes) if sizes else 0
        if not self.size:
            return
        count = -(-base.length // self.size)
        self.table = torch.zeros(len(per_sequence), base.heads, count, count, dtype=torch.bool, device=base.device)
        if base.blocks is not None:
            written = torch.stack([base.block_table(0, h)[:, :-1] for h in range(base.heads)])
            self._put(slice(None), list(range(base.heads)), written, base.blocks.size)

    def add(self, z: int, heads: list[int], chosen: Chosen) -> None:
        assert chosen.table is not None
        self._put(z, heads, chosen.table, chosen.block)

    def _put(self, z: int | slice, heads: list[int], table: Tensor, size: int) -> None:
        finer = size // self.size
        fine = table.repeat_interleave(finer, -2).repeat_interleave(finer, -1)
        rows, keys = (min(self.table.shape[-1], extent) for extent in fine.shape[-2:])
        self.table[z, heads, :rows, :keys] |= fine[..., :rows, :keys]

    def blocks(self) -> Blocks | None:
        """The tables as lists, every causal block once, ascending."""
        if not self.size:
            return None
        table = self.table.tril()
        # A stable sort of "not listed" brings the listed blocks to the front in ascending order.
        order = torch.sort((~table).to(torch.uint8), dim=-1, stable=True).indices
        count = table.sum(-1)
        index = torch.where(torch.arange(table.shape[-1], device=table.device) < count[..., None], order, -1)
        return Blocks(self.size, count.to(torch.int32), index.to(torch.int32))
