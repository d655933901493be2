"""FlexAttention on the masks of layouts, from tile lists of our own: what users of torch have without this package."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.fa4.lists import TileLists, lists_of_blocks, lists_of_rule
from attnsieve.backends.facts import facts
from attnsieve.errors import require
from attnsieve.layout import Blocks, Layout

_TILE = 128


def attend(call: Call, kernel: str) -> Tensor:
    """Attention of whole sequences under a layout of blocks, `end` and offsets by the kernel "TRITON" or "FLASH".

    Raises UserError for layouts with a captured corner, and for masks that are one per sequence.
    """
    mask = call.layout.schedule(("flex", call.q.shape[1]), lambda: _block_mask(call))
    options = {"BACKEND": kernel} if kernel == "FLASH" else {}
    out: Tensor = compiled()(
        call.q, call.k, call.v, block_mask=mask, scale=call.scale, enable_gqa=call.group > 1, kernel_options=options
    )
    return out


@cache
def compiled() -> Any:
    """flex_attention, compiled anew for every shape and mask."""
    from torch.nn.attention.flex_attention import flex_attention

    # Beyond this limit compiled functions fall back to eager code, which ignores the lists: then rather fail.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(call: Call) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    layout, heads = call.layout, call.q.shape[1]
    require(layout.corner is None and layout.sequences == 1, "FlexAttention is compared on layouts without a captured corner")
    lists = _lists(layout).per_query_head(heads)
    return BlockMask.from_kv_blocks(
        lists.part_count,
        _widened(lists.part, layout),
        lists.whole_count,
        _widened(lists.whole, layout),
        BLOCK_SIZE=(_TILE, _TILE),
        mask_mod=_mask_mod(layout, heads),
        seq_lengths=(call.q.shape[2], call.k.shape[2]),
        compute_q_blocks=False,
    )


def _widened(index: Tensor, layout: Layout) -> Tensor:
    """Lists with room for every key tile, which FlexAttention insists on."""
    return torch.nn.functional.pad(index, (0, -(-layout.length // _TILE) - index.shape[-1])).contiguous()


def _lists(layout: Layout) -> TileLists:
    if facts(layout).dense:
        count = -(-layout.length // _TILE)
        row = torch.arange(count, dtype=torch.int32, device=layout.device)
        return lists_of_blocks(Blocks(_TILE, _TILE, (row + 1)[None, None], _triangle(row)[None, None]), _TILE)
    return lists_of_rule(layout, _TILE) if layout.blocks is None else lists_of_blocks(layout.blocks, _TILE)


def _triangle(row: Tensor) -> Tensor:
    """int32 [T, T]: the tiles up to each row's, -1 beyond."""
    return torch.where(row[None, :] <= row[:, None], row[None, :], -1)


def _mask_mod(layout: Layout, heads: int) -> Any:
    """The predicate of partial tiles: whole blocks leave causality only."""
    if facts(layout).dense or facts(layout).only_blocks:
        return lambda b, h, i, j: j <= i
    end = layout.end[0].repeat_interleave(heads // layout.heads, dim=0)
    if layout.offset is None:
        return lambda b, h, i, j: (j <= i) & (i < end[h, j])
    offset = layout.offset[0].repeat_interleave(heads // layout.heads, dim=0)
    return lambda b, h, i, j: (j <= i) & ((i < end[h, j]) | offset[h, (i - j).clamp(min=0)])
