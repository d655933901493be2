"""Calls of flash_attn.cute: which of its masks a layout becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnsieve.backends.call import Call, aligned
from attnsieve.backends.fa4 import TILE
from attnsieve.backends.fa4.columns import move_columns, rows_by_end
from attnsieve.backends.fa4.lists import TileLists, lists_of_blocks, lists_of_rule
from attnsieve.backends.facts import facts
from attnsieve.device import is_capturing
from attnsieve.layout import Layout

T = TypeVar("T")


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D], LSE [B, Hq, Tq]."""
    known = facts(call.layout)
    if known.dense:
        return _forward(call, causal=True)
    if known.window is not None:
        return _forward(call, window_size_left=known.window - 1, window_size_right=0)
    mask = built(call)
    lists = _of_last_shape(call, "lists", lambda: _cut(call, mask))
    if mask.keep is None:
        return _forward(call, causal=True, block_sparse_tensors=lists, pack_gqa=False)
    rest = {"mask_mod": _predicate(mask.keep), "aux_tensors": mask.vectors, "block_sparse_tensors": lists, "pack_gqa": False}
    return _forward(call if mask.columns is None else _with_columns(call, mask.columns), **rest)


@dataclass(frozen=True)
class TileMask:
    """A layout as lists for every query head, the name of the predicate for partial tiles (None: causality), the vectors
    [Hq, slots] that it reads, and the columns int32 [Hkv, F] that lists and vectors expect in front of K."""

    lists: TileLists
    keep: str | None = None
    vectors: list[Tensor] = field(default_factory=list)
    columns: Tensor | None = None


def _forward(call: Call, **mask: Any) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (aligned(tensor).transpose(1, 2) for tensor in (call.q, call.k, call.v))
    out, lse = _flash_attn_fwd(q, k, v, softmax_scale=call.scale, return_lse=True, **mask)[:2]
    return out.transpose(1, 2), lse


def _of_last_shape(call: Call, name: str, make: Callable[[], T]) -> T:
    """What `make` returned for the last call, if that had this shape: things that take launches or are large."""
    if is_capturing(call.q):
        # A graph computes nothing before it is replayed, and is replayed when what the last call had may be gone.
        return make()
    last: dict[Any, T] = call.layout.schedule(("fa4", name, call.q.shape[1], call.k.shape[1]), dict)
    shape = (call.q.shape, call.k.shape, call.v.shape, call.q.dtype)
    found = last.get(shape)
    if found is None:
        found = make()
        last.clear()
        last[shape] = found
    return found


def _cut(call: Call, mask: TileMask) -> Any:
    """The lists of the call's query tiles."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    first, stop = (call.k.shape[2] - call.q.shape[2]) // TILE, -(-call.k.shape[2] // TILE)
    in_front = 0 if mask.columns is None else mask.columns.shape[1] // TILE
    part_count, part, whole_count, whole = mask.lists.rows(first, stop, stop + in_front)
    return BlockSparseTensorsTorch(part_count, part, whole_count, whole, block_size=(TILE, TILE))


def _predicate(name: str) -> Callable[..., Any]:
    from attnsieve.backends.fa4 import keep

    found: Callable[..., Any] = getattr(keep, name)
    return found


def _with_columns(call: Call, index: Tensor) -> Call:
    from attnsieve.backends.fa4.copies import KeysInFront

    of_k, of_v = _of_last_shape(call, "copies", lambda: [KeysInFront(x.shape, index) for x in (call.k, call.v)])
    return replace(call, k=of_k(call.k), v=of_v(call.v))


def built(call: Call) -> TileMask:
    """What the layout becomes, kept with it."""
    layout, heads, kv_heads = call.layout, call.q.shape[1], call.k.shape[1]
    return layout.schedule(("fa4", heads, kv_heads), lambda: _build(layout, heads, kv_heads))


def _build(layout: Layout, heads: int, kv_heads: int) -> TileMask:
    if layout.blocks is not None:
        return TileMask(lists_of_blocks(layout.blocks, TILE).per_query_head(heads))
    moved = move_columns(layout, heads, kv_heads, TILE) if layout.offset is None else None
    if moved is not None:
        return TileMask(moved.lists.per_query_head(heads), "keep_by_rows", _padded([moved.rows], heads), moved.index)
    lists, rows = lists_of_rule(layout, TILE).per_query_head(heads), rows_by_end(layout.end[0])
    if layout.offset is None:
        return TileMask(lists, "keep_by_rows", _padded([rows], heads))
    return TileMask(lists, "keep_by_rows_or_offset", _padded([rows, layout.offset[0].to(torch.int32)], heads))


def _padded(vectors: list[Tensor], heads: int) -> list[Tensor]:
    """One row per query head, and room: kernels look at positions of whole tiles, which may end after the last one."""
    shared = heads // len(vectors[0])
    return [torch.nn.functional.pad(vector, (0, 2 * TILE)).repeat_interleave(shared, dim=0).contiguous() for vector in vectors]


def moved_bytes(call: Call) -> int:
    """What is written of K and V with columns in front of them, 0 where there are none."""
    columns = None if facts(call.layout).window is not None else built(call).columns
    if columns is None:
        return 0
    width = call.k.shape[3] + call.v.shape[3]
    return call.k.shape[0] * call.k.shape[1] * (columns.shape[1] + call.k.shape[2]) * width * call.k.element_size()


def has_predicate(call: Call) -> bool:
    """Whether partial tiles are masked by a predicate of ours and not by the kernel's own causality and windows."""
    return facts(call.layout).window is None and built(call).keep is not None


def tile_counts(call: Call) -> tuple[int, int]:
    """Key tiles that all query tiles of one batch row visit: those kept whole, and those kept in part."""
    known, keys = facts(call.layout), call.k.shape[2]
    first, stop = (keys - call.q.shape[2]) // TILE, -(-keys // TILE)
    if known.window is not None:
        visited = sum(min(t, -(-(known.window - 1) // TILE)) + 1 for t in range(first, stop))
        partial = sum(1 + (t * TILE >= known.window) for t in range(first, stop))
        return max(visited - partial, 0) * call.q.shape[1], partial * call.q.shape[1]
    lists = built(call).lists
    counts = torch.stack([count[:, :, first:stop].sum() for count in (lists.whole_count, lists.part_count)]).tolist()
    return int(counts[0]), int(counts[1])
