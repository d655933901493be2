"""From patterns to a layout: the vectors of one layer, head by head, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from numbers import Integral

import torch
from torch import Tensor

from attnsieve.errors import UserError, require
from attnsieve.layout.counting import corner_parts
from attnsieve.layout.vectors import Blocks, Layout
from attnsieve.patterns import FOREVER, BlockRows, Pattern
from attnsieve.patterns.corner import pack_bits

_LEAST_CAPACITY = 256


def capacity_for(tokens: int) -> int:
    """Positions to compile a layout for that `tokens` positions are needed of: a power of two from 256, so that a growing text and
    texts of similar lengths share what is compiled."""
    return max(_LEAST_CAPACITY, 1 << (tokens - 1).bit_length())


def compile_layout(
    patterns: Sequence[Pattern], length: int, device: torch.device | str = "cpu", *, window: int | None = None
) -> Layout:
    """The layout of one layer from one static pattern per head, for positions 0 .. length - 1; with `window`, of the patterns'
    pairs with i - j < window alone (a model's own sliding window).

    Raises UserError for an empty list, what is no Pattern, a length or a window that is no whole number from 1, a pattern that chooses
    keys from the input, what is no device, and within a window for patterns that keep whole blocks.
    """
    if not (isinstance(patterns, Sequence) and all(isinstance(pattern, Pattern) for pattern in patterns)):
        # Said only where it is needed: patterns of many columns are long texts.
        raise UserError(
            f"compile_layout takes a list with a Pattern per head, got {patterns!r:.80}: use Pattern.parse for text"
        )
    require(len(patterns) > 0, "compile_layout needs one pattern per head, got none")
    for name, number in (("length", length), ("window", 1 if window is None else window)):
        good = isinstance(number, Integral) and 0 < number < FOREVER
        require(good, f"a layout's {name} must be a whole number from 1 to {FOREVER - 1}, got {number!r}")
    chosen = [str(pattern) for pattern in patterns if pattern.dynamic]
    require(not chosen, f"compile_layout takes static patterns; {chosen[:1]} chooses its keys from the input")
    target = _device(device)
    unique = {pattern: _head(pattern, length, window or length) for pattern in dict.fromkeys(patterns)}
    heads = [unique[pattern] for pattern in patterns]
    corner, corner_rows = _stack_corners(patterns, length, window or length)
    layout = Layout(
        length,
        torch.stack([head.end for head in heads])[None],
        _stack_offsets(heads, length),
        corner,
        corner_rows,
        _stack_blocks([head.blocks for head in heads], length),
        windows=all(_one_window(head.end) for head in unique.values()),
    )
    return layout.to(target)


def _device(given: torch.device | str) -> torch.device:
    try:
        return torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"unknown device {given!r:.80}: give a torch.device or its name, such as cpu or cuda:0") from None


@dataclass(frozen=True)
class _Head:
    end: Tensor
    offset: Tensor | None
    blocks: list[BlockRows]


def _head(pattern: Pattern, n: int, window: int) -> _Head:
    ends = [end for atom in pattern if (end := atom.end(n)) is not None]
    offsets = [offset for atom in pattern if (offset := atom.offsets(n)) is not None]
    blocks = [block for atom in pattern if (block := atom.blocks(n)) is not None]
    require(window >= n or not blocks, f"{pattern} keeps whole blocks, which a window of {window} would cut through")
    end = reduce(torch.maximum, ends, torch.zeros(n, dtype=torch.int64))
    offset = reduce(torch.logical_or, offsets) if offsets else None
    if window < n:
        end = torch.minimum(end, torch.arange(n) + window)
        offset = None if offset is None else offset & (torch.arange(n) < window)
    return _Head(end.to(torch.int32), offset, blocks)


def _one_window(end: Tensor) -> bool:
    """Whether every end, int32 [n], is FOREVER or what one window gives."""
    life = (end - torch.arange(len(end), dtype=torch.int32)).clamp_min(0)[end != FOREVER]
    return len(life) == 0 or bool((life == life[0]).all())


def _stack_offsets(heads: list[_Head], n: int) -> Tensor | None:
    if all(head.offset is None for head in heads):
        return None
    none = torch.zeros(n, dtype=torch.bool)
    return torch.stack([none if head.offset is None else head.offset for head in heads])[None]


def _stack_corners(patterns: Sequence[Pattern], n: int, window: int) -> tuple[Tensor | None, Tensor | None]:
    rows = [min(pattern.corner_rows, n) for pattern in patterns]
    largest = max(rows)
    if not largest:
        return None, None
    packed = torch.zeros(len(patterns), largest, -(-largest // 8), dtype=torch.uint8)
    for pattern in dict.fromkeys(patterns):
        first, *others = [h for h, other in enumerate(patterns) if other == pattern]
        _write_corner(packed[first], pattern, rows[first], window)
        for h in others:
            packed[h] = packed[first]
    return packed, torch.tensor(rows, dtype=torch.int32)


def _write_corner(bits: Tensor, pattern: Pattern, side: int, window: int) -> None:
    """Set the bits of a pattern's first `side` rows in `bits`, uint8 [>= side, >= ceil(side / 8)], so far 0."""
    for first, stop in corner_parts(side):
        rows, keys = torch.arange(first, stop)[:, None], torch.arange(stop)
        kept = pattern.keep(rows, keys) & (rows - keys < window)
        bits[first:stop, : -(-stop // 8)] = torch.from_numpy(pack_bits(kept))


def _stack_blocks(heads: list[list[BlockRows]], n: int) -> Blocks | None:
    sizes = [block.size for head in heads for block in head]
    if not sizes:
        return None
    size = reduce(gcd, sizes)
    lists = [[_blocks_of_row(head, row, size) for row in range(-(-n // size))] for head in heads]
    count = torch.tensor([[len(keys) for keys in rows] for rows in lists], dtype=torch.int32)
    index = torch.full((*count.shape, max(1, int(count.max()))), -1, dtype=torch.int32)
    for h, rows in enumerate(lists):
        for row, keys in enumerate(rows):
            index[h, row, : len(keys)] = torch.tensor(keys, dtype=torch.int32)
    return Blocks(size, size, count[None], index[None])


def _blocks_of_row(blocks: list[BlockRows], row: int, size: int) -> list[int]:
    """Key blocks of `size` tokens that a row of blocks keeps, ascending, each once, none after the row."""
    found: set[int] = set()
    for block in blocks:
        finer = block.size // size
        listed = block.index[row // finer, : int(block.count[row // finer])].tolist()
        found.update(key * finer + step for key in listed for step in range(finer))
    return sorted(key for key in found if key <= row)
