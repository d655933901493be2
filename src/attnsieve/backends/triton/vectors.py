"""A layout's bits in the order in which kernels read them, and how many of them lie before a place."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.triton.bits import TAIL
from attnsieve.backends.triton.survey import CHUNK, OFFSETS, WINDOW, Survey
from attnsieve.launching import launch
from attnsieve.layout import Blocks, Layout


class Before(NamedTuple):
    """How many bits are set before a place, int32 [Z, H, ...], for places at multiples of `step`.

    below, upto [.., width]: below step * x, and at it or below; last [.., B]: below n - keys * b. The last entry of `below` counts all.
    """

    below: Tensor
    upto: Tensor
    last: Tensor
    width: int


def words_of_distances(layout: Layout, found: Survey | None, windows: bool) -> Tensor:
    """int32 [Z, H, words]: bit u says whether distance C - u is kept, C = 32 words - 512, so that a row's keys ascend in u.

    By the layout's offset or, with `windows`, by the window that was found for each head.
    """
    # Rows of the last query tile may lie up to 256 positions beyond the capacity.
    words = (-(-(layout.length + 256) // 32) * 32 + TAIL.value) // 32
    result = torch.empty(*layout.end.shape[:2], words, dtype=torch.int32, device=layout.device)
    offset = None if layout.offset is None else layout.offset.contiguous().view(torch.uint8)
    lives = None if found is None or not windows else found.found[WINDOW]
    programs = 0 if lives is None else lives.shape[-1]
    grid = (-(-words * 32 // CHUNK), layout.end.shape[:2].numel())
    launch(_distances_kernel, grid, offset, lives, result, layout.length, words, programs, CHUNK)
    return result


def count_offsets(found: Survey, n: int, positions: int, keys: int) -> Before | None:
    """Of the distances that `offset` keeps; None without."""
    return None if found.offsets is None else _count(found.offsets, found.found[OFFSETS], None, n, positions, keys)


def list_flagged(
    words: Tensor, counts: Tensor, n: int, positions: int, keys: int, room: int, spare: int
) -> tuple[Tensor, Before]:
    """int32 [Z, H, room + spare]: the flagged keys of each head, ascending, then numbers beyond all keys; and how many come before.

    words: a bit a key; counts: how many in each chunk of keys.
    """
    keys_of_head = torch.full((*words.shape[:2], room + spare), 2**31 - 1, dtype=torch.int32, device=words.device)
    return keys_of_head, _count(words, counts, keys_of_head, n, positions, keys)


def _count(words: Tensor, counts: Tensor, places: Tensor | None, n: int, positions: int, keys: int) -> Before:
    sides, step = words.shape[:2], min(positions, keys)
    width = -(-n // step) + 1
    new = lambda size: torch.empty(*sides, size, dtype=torch.int32, device=words.device)  # noqa: E731
    before = Before(new(width), new(width), new(-(-n // keys)), width)
    room = 0 if places is None else places.shape[-1]
    grid = (-(-(n + step) // CHUNK), sides.numel())
    numbers = (room, n, words.shape[-1], counts.shape[-1], step, keys, CHUNK)
    launch(_count_kernel, grid, words, counts, before, places, *numbers, num_warps=8)
    return before


def flags_of(words: Tensor, n: int) -> Tensor:
    """bool [Z, H, n] of words with a bit a key."""
    key = torch.arange(n, device=words.device)
    return (words[..., key // 32] >> (key % 32)) & 1 != 0


def bits_of_blocks(blocks: Blocks) -> Tensor:
    """int32 [Z, H, nb, ceil(nb / 32)]: bit b of row a says that block (a, b) is listed."""
    *sides, nb, room = blocks.index.shape
    words = torch.zeros(*sides, nb, -(-nb // 32), dtype=torch.int32, device=blocks.index.device)
    grid = (words.shape[:3].numel(),)
    numbers = (room, words.shape[-1])
    launch(_blocks_kernel, grid, blocks.count.contiguous(), blocks.index.contiguous(), words, *numbers, STEP=128, num_warps=1)
    return words


@triton.jit
def _distances_kernel(p_offset, p_lives, p_words, n, words, programs, CHUNK: tl.constexpr):
    o_zh = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    bit = tl.arange(0, 32)
    d = words * 32 - TAIL - (at[:, None] * 32 + bit[None, :])
    inside = (d >= 0) & (d < n)
    kept = d < 0
    if p_lives is not None:
        window = 0
        for x0 in range(0, programs, 128):
            x = x0 + tl.arange(0, 128)
            lives = tl.load(p_lives + o_zh * programs + x, mask=x < programs, other=0)
            window = tl.maximum(window, tl.max(lives, 0).to(tl.int32))
        kept = d < window
    if p_offset is not None:
        kept = kept | (tl.load(p_offset + o_zh * n + d, mask=inside, other=0) != 0)
    word = tl.sum((kept & inside).to(tl.int32) << bit[None, :], 1)
    tl.store(p_words + o_zh * words + at, word, mask=at < words)


@triton.jit
def _count_kernel(
    p_words,
    p_counts,
    before,
    p_places,
    room,
    n,
    words,
    programs,
    STEP: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Number the set bits of a chunk, and write where they are."""
    chunk, o_zh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    earlier = 0
    for x0 in range(0, chunk, 128):
        x = x0 + tl.arange(0, 128)
        earlier += tl.sum(tl.load(p_counts + o_zh * programs + x, mask=x < chunk, other=0), 0).to(tl.int32)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    bit = (tl.load(p_words + o_zh * words + (j >> 5), mask=(j >> 5) < words, other=0) >> (j & 31)) & 1
    upto = earlier + tl.cumsum(bit, 0)
    below = upto - bit
    o_before = o_zh * before.width
    here = (j % STEP == 0) & (j // STEP < before.width)
    tl.store(before.below + o_before + j // STEP, below, mask=here)
    tl.store(before.upto + o_before + j // STEP, upto, mask=here)
    tl.store(before.last + o_zh * tl.cdiv(n, N) + (n - j) // N, below, mask=(j > 0) & (j <= n) & ((n - j) % N == 0))
    if p_places is not None:
        tl.store(p_places + o_zh * room + below, j, mask=(bit != 0) & (below < room))


@triton.jit
def _blocks_kernel(p_count, p_index, p_words, room, words, STEP: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64)
    count = tl.load(p_count + o_row)
    for x0 in range(0, count, STEP):
        x = x0 + tl.arange(0, STEP)
        block = tl.load(p_index + o_row * room + x, mask=x < count, other=0)
        tl.atomic_or(p_words + o_row * words + (block >> 5), 1 << (block & 31), mask=x < count, sem="relaxed")
