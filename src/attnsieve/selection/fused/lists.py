"""From flags to ascending lists."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch


@triton.jit
def count_kernel(table, count, rows, width, first, SIDE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr):
    """count int32 [R]: flags of each row of table uint8 [R, width] at blocks of KEYS keys that some of its SIDE queries read."""
    i_r = tl.program_id(0).to(tl.int64)
    stop = tl.minimum(width, tl.cdiv((first + i_r % rows + 1) * SIDE, KEYS)).to(tl.int32)
    total = 0
    for start in range(0, stop, STEP):
        o = start + tl.arange(0, STEP)
        total += tl.sum((tl.load(table + i_r * width + o, mask=o < stop, other=0) != 0).to(tl.int32), 0)
    tl.store(count + i_r, total)


@triton.jit
def fill_kernel(table, index, rows, width, room, first, SIDE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr):
    """index int32 [R, room]: numbers of the flags that `count_kernel` counts, ascending, then -1."""
    i_r = tl.program_id(0).to(tl.int64)
    stop = tl.minimum(width, tl.cdiv((first + i_r % rows + 1) * SIDE, KEYS)).to(tl.int32)
    p_index = index + i_r * room
    at = 0
    for start in range(0, stop, STEP):
        o = start + tl.arange(0, STEP)
        flag = (tl.load(table + i_r * width + o, mask=o < stop, other=0) != 0).to(tl.int32)
        tl.store(p_index + at + tl.cumsum(flag, 0) - 1, o, mask=flag != 0)
        at += tl.sum(flag, 0)
    for start in range(at, room, STEP):
        o = start + tl.arange(0, STEP)
        tl.store(p_index + o, -1, mask=o < room)


def listed(table: Tensor, side: int, keys: int, first: int) -> tuple[Tensor, Tensor]:
    """count int32 [Z, H, rows] and index int32 [Z, H, rows, K] of bool table [Z, H, rows, width], row 0 of which is row `first` of
    blocks of `side` queries by `keys` keys. Single keys are counted, read back, for their room."""
    table = table.contiguous().view(torch.uint8)
    rows, width = table.shape[-2:]
    count = table.new_empty(table.shape[:-1], dtype=torch.int32)
    step = min(4096, int(triton.next_power_of_2(width)))
    constants = {"SIDE": side, "KEYS": keys, "STEP": step, "num_warps": max(1, step // 512)}
    launch(count_kernel, (count.numel(),), table, count, rows, width, first, **constants)
    room = width if side == keys else max(1, int(count.max()))
    index = table.new_empty(*table.shape[:-1], room, dtype=torch.int32)
    launch(fill_kernel, (count.numel(),), table, index, rows, width, room, first, **constants)
    return count, index
