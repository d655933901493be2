"""Which tile shapes a call gets; measured by benchmarks/tune.py on an H100."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnsieve.backends.call import Call
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.shares import Tuning
from attnsieve.device import padded

# Prefill in half precision, heads up to 128 wide: square blocks; columns and windows; masks with diagonals or lists of keys for
# blocks of queries; DMA's lists of keys. Half the registers let two programs share a multiprocessor, which hides their waiting.
BLOCKS = Tiles(128, 64, 8, 2, registers=128)
COLUMNS = Tiles(128, 64, 8, 2, registers=128)
TOKENS = Tiles(64, 64, 4, 2)
SELECTED = Tiles(128, 64, 8, 2, registers=128)
# Rows over which the gradients of listed keys are summed before they are added to memory.
STRETCH_ROWS = 512


def forward_tiles(call: Call) -> Tiles:
    """Tiles of the prefill kernel. A query tile lies within one row of blocks where those are lists of keys."""
    tiles, blocks = _any_forward_tiles(call), call.layout.blocks
    if blocks is None or blocks.keys == blocks.rows:
        return tiles
    packed = Geometry(call, tiles).packed
    return replace(tiles, rows=min(tiles.rows, blocks.rows * packed))


def _any_forward_tiles(call: Call) -> Tiles:
    if call.q.element_size() == 4:
        return Tiles(64, 32, 4, 2) if _widest(call) <= 128 else Tiles(32, 16, 4, 2)
    if _widest(call) > 128:
        return Tiles(64, 32, 4, 2)
    if call.layout.most_keys is not None:
        return SELECTED
    blocks = call.layout.blocks
    if blocks is not None:
        return BLOCKS if blocks.keys == blocks.rows else TOKENS
    return COLUMNS if call.layout.offset is None else TOKENS


def query_tiles(call: Call) -> Tiles:
    """Tiles of the dQ kernel."""
    if call.q.element_size() == 4:
        return Tiles(32, 32, 4, 1) if _widest(call) <= 128 else Tiles(32, 16, 4, 1)
    return Tiles(64, 64, 4, 2) if _widest(call) <= 128 else Tiles(64, 32, 4, 1)


def key_tiles(call: Call) -> Tiles:
    """Tiles of the dK and dV kernels, which hold `keys` keys and go through `rows` rows at a time."""
    if call.q.element_size() == 4:
        return Tiles(32, 32, 4, 1) if _widest(call) <= 128 else Tiles(16, 16, 4, 1)
    return Tiles(64, 64, 4, 2) if _widest(call) <= 128 else Tiles(32, 32, 4, 1)


def decode_tuning(widths: int, dtype: torch.dtype) -> Tuning:
    """Shares of the decode kernels for keys and values of `widths` together: about 16 KB at a time."""
    keys = 2**14 // (widths * dtype.itemsize)
    return Tuning(1 << min(6, max(4, keys.bit_length() - 1)), 4, 2, 4 if keys >= 16 else 2)


def _widest(call: Call) -> int:
    return max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
