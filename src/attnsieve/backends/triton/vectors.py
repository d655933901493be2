"""A layout's bits in the order in which kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.backends.triton.bits import TAIL
from attnsieve.layout import Blocks

_TAIL = TAIL.value


def words_of_offsets(offset: Tensor) -> Tensor:
    """int32 [Z, H, words] of bool [Z, H, n]: bit u is distance C - u with C = 32 words - 512, so a row's keys ascend in u."""
    n = offset.shape[-1]
    # Rows of the last query tile may lie up to 256 positions beyond the capacity.
    bits = -(-(n + 256) // 32) * 32 + _TAIL
    reversed_bits = offset.new_zeros(*offset.shape[:-1], bits)
    reversed_bits[..., bits - _TAIL - n + 1 : bits - _TAIL + 1] = offset.flip(-1)
    return _packed(reversed_bits)


def words_of_keys(flags: Tensor) -> Tensor:
    """int32 [Z, H, words] of bool [Z, H, n], the first key in the lowest bit, with spare words: the next tile is read ahead."""
    return _packed(torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 128 + _TAIL)))


def _packed(bits: Tensor) -> Tensor:
    weights = torch.ones(32, dtype=torch.int64, device=bits.device) << torch.arange(32, device=bits.device)
    words = (bits.unflatten(-1, (-1, 32)) * weights).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def bits_of_blocks(blocks: Blocks) -> Tensor:
    """int32 [Z, H, nb, ceil(nb / 32)]: bit b of row a says that block (a, b) is listed."""
    nb = blocks.index.shape[-2]
    listed = blocks.index >= 0
    block = torch.where(listed, blocks.index, 0).long()
    bit = torch.ones((), dtype=torch.int32, device=block.device) << (block % 32).to(torch.int32)
    words = torch.zeros(*blocks.index.shape[:-1], -(-nb // 32), dtype=torch.int32, device=block.device)
    # A block is listed once, so adding its bit is setting it.
    return words.scatter_add_(-1, block // 32, torch.where(listed, bit, 0))
