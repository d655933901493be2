"""The k-th smallest position among the better keys, for every key at once: a wavelet tree walked in parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kth_position(order: Tensor, k: Tensor) -> Tensor:
    """For each rank r: the k[r]-th smallest (from 0) of order[:r], where order lists positions, best key first.

    order: int32 [R, n], a permutation of 0 .. n - 1 per row; k: int32 [R, n]. Returns int32 [R, n]; a rank with k[r] >= r has
    no answer and gets an arbitrary position. O(R n log n) time, O(R n) memory; per bit of a position some elementwise passes, a
    cumsum, a gather and a scatter.

    Round by round, the positions are split by their bits, highest first. Before the round of bit b, the array `level` holds
    every node (positions that share the bits above b) at its own place, its members in rank order; each query knows its
    node and how many better keys are inside. Since positions are a permutation, every node but the last is full, so the
    number of one bits before a node is half its first index.
    """
    n = order.shape[-1]
    index = torch.arange(n, dtype=torch.int32, device=order.device)
    level, inside, node = order, index.expand_as(order), torch.zeros_like(order)
    k = torch.minimum(k, inside - 1)
    for bit in reversed(range((n - 1).bit_length())):
        half = 1 << bit
        one = level >= half
        ones = F.pad(one.cumsum(-1, dtype=torch.int32), (1, 0))
        pointer = node + inside
        zeros_inside = pointer - ones.gather(-1, pointer.long()) - (node >> 1)
        right = k >= zeros_inside
        k = k - zeros_inside * right
        inside = torch.where(right, inside - zeros_inside, zeros_inside)
        node = torch.add(node, right, alpha=half)
        level = _split(level, one, ones[..., :-1], index, bit)
    return node


def _split(level: Tensor, one: Tensor, ones_before: Tensor, index: Tensor, bit: int) -> Tensor:
    """Every node's members with bit 0, then those with bit 1, in the same order; that bit removed."""
    half = 1 << bit
    half_node = (index >> (bit + 1)) << bit
    target = torch.where(one, ones_before + (half_node + half), index + half_node - ones_before)
    return torch.empty_like(level).scatter_(-1, target.long(), level & (half - 1))
