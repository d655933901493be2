"""From the patterns of one layer and its q and k to a Layout, static and dynamic parts joined.

A layer whose sequences have equal shapes takes a fixed number of operations for each of its atoms, whatever the number of heads
and sequences, and does not wait for the device, except for the longest list where single keys are listed (`probed_keys`). More than
memory allows is done in parts: rows of blocks or KV heads one after the other, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attnsieve.device import on_device_of
from attnsieve.errors import require
from attnsieve.layout import Layout, capacity_for, compile_layout
from attnsieve.patterns import Pattern
from attnsieve.patterns.dynamic import (
    AntidiagonalBlocks,
    CallAtom,
    DamOnline,
    DenseDecode,
    DensePrefill,
    HeavyHitters,
    LastQueries,
    PooledBlocks,
    ProbedBlocks,
    ProbedKeys,
    TopBlocks,
    VerticalSlash,
    VotedKeys,
)
from attnsieve.selection.blocks import antidiagonal_blocks, pooled_blocks, probed_blocks, probed_keys, top_blocks
from attnsieve.selection.carriers import Carrier, carriers, per_group
from attnsieve.selection.join import Part, Static, join
from attnsieve.selection.keys import heavy_hitters, voted_keys
from attnsieve.selection.memo import once_per_row
from attnsieve.selection.phases import dense_decode, dense_prefill, last_queries
from attnsieve.selection.probe import dam_online, vertical_slash
from attnsieve.selection.sequence import Chosen, SequenceQK
from attnsieve.spans import Spans

SELECTORS: dict[type[CallAtom], Callable[[Any, SequenceQK], Chosen]] = {
    VerticalSlash: vertical_slash,
    DamOnline: dam_online,
    ProbedBlocks: probed_blocks,
    ProbedKeys: probed_keys,
    AntidiagonalBlocks: antidiagonal_blocks,
    PooledBlocks: pooled_blocks,
    TopBlocks: top_blocks,
    HeavyHitters: heavy_hitters,
    VotedKeys: voted_keys,
    LastQueries: last_queries,
    DensePrefill: dense_prefill,
    DenseDecode: dense_decode,
}
# The layers of a forward pass share their spans, which may have to be read from the device.
_ROWS: WeakKeyDictionary[Spans, list[tuple[int, int, int, int, int]]] = WeakKeyDictionary()


def choose(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, *, spans: Spans | None = None, scale: float | None = None
) -> Layout:
    """The layout of this call: one pattern per query head, dynamic atoms resolved from q [B, Hq, Tq, D] and k [B, Hkv, Tk, D].

    The result has one set of masks per sequence of `spans` (default: every batch row is one) and a length of Tk positions. It
    has Hkv heads where the query heads of every KV group share a mask (equal patterns whose atoms have share="kv"), else Hq.
    Rows of positions before the queries are left open: a chosen layout serves the call it was chosen for.

    Raises UserError where a dynamic atom is joined to rules that start at a later row, where only some query heads of a KV
    group carry an atom that chooses for all of them, and for patterns that do not fit q.
    """
    require(len(patterns) == q.shape[1], f"choose needs one pattern per query head ({q.shape[1]}), got {len(patterns)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    patterns = tuple(patterns)
    carried = carriers(patterns, group)
    rows = patterns[::group] if per_group(patterns, group) else patterns
    with on_device_of(q):
        return _chosen(rows, carried, q, k, spans, scale)


def _chosen(
    rows: tuple[Pattern, ...], carried: Sequence[Carrier], q: Tensor, k: Tensor, spans: Spans | None, scale: float
) -> Layout:
    static = _static_part(rows, capacity_for(k.shape[2]), q.device).first(k.shape[2])
    parts = [
        Part(carrier, sequences, some_k.shape[2] - some_q.shape[2], SELECTORS[type(carrier.atom)](carrier.atom, read))
        for sequences, some_q, some_k in _equal_shapes(q.detach(), k.detach(), spans)
        for carrier in carried
        for read in [carrier.read(some_q, some_k, scale)]
    ]
    return join(static, q.shape[0] if spans is None else len(spans), parts) if parts else static.layout


@once_per_row
def _static_part(patterns: tuple[Pattern, ...], capacity: int, device: torch.device) -> Static:
    static = [Pattern.of(*(atom for atom in pattern if not atom.dynamic)) for pattern in patterns]
    return Static.of(compile_layout(static, capacity, device))


def _equal_shapes(q: Tensor, k: Tensor, spans: Spans | None) -> Iterator[tuple[list[int] | None, Tensor, Tensor]]:
    """Sequences that have as many queries and as many keys: their numbers (None for all, in order), q and k of them."""
    if spans is None or spans.whole == (q.shape[0], q.shape[2], k.shape[2]):
        yield None, q, k
        return
    if spans not in _ROWS:
        _ROWS[spans] = spans.rows()
    rows = _ROWS[spans]
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (_, _, queries, _, keys) in enumerate(rows):
        if queries:
            alike.setdefault((queries, keys), []).append(number)
    for numbers in alike.values():
        places = [rows[number] for number in numbers]
        some_q = torch.stack([q[b, :, q0 : q0 + nq] for b, q0, nq, _, _ in places])
        some_k = torch.stack([k[b, :, k0 : k0 + nk] for b, _, _, k0, nk in places])
        yield numbers, some_q, some_k
