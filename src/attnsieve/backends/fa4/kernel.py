"""Calls of flash_attn.cute: which of its masks a layout becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.fa4 import TILE
from attnsieve.backends.fa4.lists import TileLists, lists_of_blocks, lists_of_rule
from attnsieve.backends.facts import facts
from attnsieve.layout import Layout


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D], LSE [B, Hq, Tq]."""
    known = facts(call.layout)
    if known.dense:
        return _forward(call, causal=True)
    if known.window is not None:
        return _forward(call, window_size_left=known.window - 1, window_size_right=0)
    lists = _lists(call)
    if known.only_blocks:
        return _forward(call, causal=True, block_sparse_tensors=lists, pack_gqa=False)
    keep, vectors = _predicate(call)
    return _forward(call, mask_mod=keep, aux_tensors=vectors, block_sparse_tensors=lists, pack_gqa=False)


def _forward(call: Call, **mask: Any) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (tensor.detach().transpose(1, 2) for tensor in (call.q, call.k, call.v))
    out, lse = _flash_attn_fwd(q, k, v, softmax_scale=call.scale, return_lse=True, **mask)[:2]
    return out.transpose(1, 2), lse


def _lists(call: Call) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    keys = call.k.shape[2]
    part_count, part, whole_count, whole = built(call).rows((keys - call.q.shape[2]) // TILE, -(-keys // TILE))
    return BlockSparseTensorsTorch(part_count, part, whole_count, whole, block_size=(TILE, TILE))


def built(call: Call) -> TileLists:
    """The layout's lists for every query head, kept with it."""
    layout, heads = call.layout, call.q.shape[1]
    return layout.schedule(("fa4 lists", heads), lambda: _build(layout, heads))


def _build(layout: Layout, heads: int) -> TileLists:
    lists = lists_of_rule(layout, TILE) if layout.blocks is None else lists_of_blocks(layout.blocks, TILE)
    return lists.per_query_head(heads)


def _predicate(call: Call) -> tuple[Callable[..., Any], list[Tensor]]:
    """The predicate for partial tiles and the vectors it reads."""
    from attnsieve.backends.fa4 import keep

    layout, heads = call.layout, call.q.shape[1]
    vectors = layout.schedule(("fa4 vectors", heads), lambda: _vectors(layout, heads))
    return (keep.keep_by_end if layout.offset is None else keep.keep_by_end_or_offset), vectors


def _vectors(layout: Layout, heads: int) -> list[Tensor]:
    """int32 [Hq, n + tile] each: kernels look at positions of whole tiles, which may end after the last one."""
    found = [layout.end] if layout.offset is None else [layout.end, layout.offset]
    shared = heads // layout.heads
    return [
        torch.nn.functional.pad(vector[0].to(torch.int32), (0, 2 * TILE)).repeat_interleave(shared, dim=0).contiguous()
        for vector in found
    ]


def tile_counts(call: Call) -> tuple[int, int]:
    """Key tiles that all query tiles of one batch row visit: those kept whole, and those kept in part."""
    known, keys = facts(call.layout), call.k.shape[2]
    first, stop = (keys - call.q.shape[2]) // TILE, -(-keys // TILE)
    if known.window is not None:
        visited = sum(min(t, -(-(known.window - 1) // TILE)) + 1 for t in range(first, stop))
        partial = sum(1 + (t * TILE >= known.window) for t in range(first, stop))
        return max(visited - partial, 0) * call.q.shape[1], partial * call.q.shape[1]
    lists = built(call)
    counts = torch.stack([count[:, :, first:stop].sum() for count in (lists.whole_count, lists.part_count)]).tolist()
    return int(counts[0]), int(counts[1])
