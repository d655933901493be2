"""The predicate as bits: for static masks a row of a key tile is a few words, read once, and a pair costs one test.

What a row keeps is Toeplitz (distances: diagonals and windows) or whole columns (keys that no row drops). Both lie in memory in
ascending order of keys, so a row's words are two loads and a shift each, and causality and listed columns are applied to words.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

# Zero bits after distance 0: a key tile that starts after a query reads up to 256 + 128 + 80 of them.
TAIL = tl.constexpr(512)


@triton.jit
def in_runs(c, N: tl.constexpr):
    """The key that column c of a tile holds.

    The matrix unit gives a thread columns 2q and 2q + 1 of every 8. In this order these are N / 4 successive keys, whose bits
    lie in one word at places known when the kernel is compiled.
    """
    return ((c >> 1) & 3) * (N // 4) + (c >> 3) * 2 + (c & 1)


@triton.jit
def tile_keys(mask, j0, N: tl.constexpr):
    """Keys [N] of the key tile at j0, in the order in which `keep_by_bits` with RUNS takes them."""
    c = tl.arange(0, N)
    return j0 + (c if mask.columns is None else in_runs(c, N))


@triton.jit
def offset_words(mask, o_zh, i, j):
    """64 bits per row: bit c says whether distance i - (j + c) is kept. `mask.words` holds them in descending order of distance.

    They are loaded in halves of words, which the compiler does not send through shared memory on their way.
    """
    at = mask.n_words * 32 - TAIL - i + j
    p_half = (mask.words + o_zh * mask.n_words).to(tl.pointer_type(tl.uint16), bitcast=True) + (at >> 4)
    low = tl.load(p_half).to(tl.uint32) | (tl.load(p_half + 1).to(tl.uint32) << 16)
    high = tl.load(p_half + 2).to(tl.uint32) | (tl.load(p_half + 3).to(tl.uint32) << 16)
    last = tl.load(p_half + 4).to(tl.uint64)
    shift = (at & 15).to(tl.uint64)
    word = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (word >> shift) | (last << 1 << (63 - shift))


@triton.jit
def block_words(mask, o_zh, i, j0, j, N: tl.constexpr, SIZE: tl.constexpr):
    """The words that say which blocks of key tile j0 are listed for rows i: one per row where the tile lies in one block."""
    key = j0 // SIZE if SIZE % N == 0 else j // SIZE
    row = tl.minimum(i // SIZE, mask.n_blocks - 1)
    p_word = mask.block_bits + o_zh * mask.n_blocks * mask.block_words + row * mask.block_words
    return tl.load(p_word + tl.minimum(key >> 5, mask.block_words - 1)) >> (key & 31)


@triton.jit
def _key_words(p_words, o_word, j):
    """64 bits from key j on of a vector with one bit a key."""
    low = tl.load(p_words + o_word + (j >> 5)).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(p_words + o_word + (j >> 5) + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((high << 32) | low) >> (j & 31).to(tl.uint64)


@triton.jit
def row_words(mask, o_zh, i, j, cut, N: tl.constexpr, BLOCK: tl.constexpr):
    """64 bits per row: which of the keys j .. j + 63 of a tile of N it keeps, less those that a list serves."""
    wanted = _key_words(mask.columns, o_zh * mask.column_words, j)
    if mask.block_bits is not None:
        listed = block_words(mask, o_zh, i, j, j, N, BLOCK) & 1
        wanted = wanted | (-listed).to(tl.int64).to(tl.uint64, bitcast=True)
    newest = tl.minimum(tl.maximum(i - j, 0), 63)
    ones = tl.full([1, 1], -1, tl.int64).to(tl.uint64, bitcast=True)
    causal = tl.where(i < j, 0, ones >> (63 - newest).to(tl.uint64))
    word = offset_words(mask, o_zh, i, j) | (wanted & causal)
    if mask.listed is not None:
        word ^= word & tl.where(j < cut, _key_words(mask.listed, o_zh * mask.column_words, j), 0)
    return word


@triton.jit
def tile_words(mask, o_zh, i, j0, cut, N: tl.constexpr, BLOCK: tl.constexpr):
    """`row_words` at a tile's first key and 64 keys later, for tiles of up to 128 keys; anything without columns."""
    if mask.columns is None:
        return i, i
    else:
        word = row_words(mask, o_zh, i, j0, cut, N, BLOCK)
        return word, row_words(mask, o_zh, i, j0 + 64, cut, N, BLOCK) if N > 64 else word


@triton.jit
def _near(word, far, start):
    """The 32 bits from bit `start` on, of one word or, from 64 on, of another."""
    return (tl.where(start < 64, word, far) >> (start & 63).to(tl.uint64)).to(tl.uint32)


@triton.jit
def keep_by_offset(mask, o_zh, i, c, j0, N: tl.constexpr):
    """Whether distances i - (j0 + c) are kept; for any c below N."""
    word = offset_words(mask, o_zh, i, j0)
    far = offset_words(mask, o_zh, i, j0 + 64) if N > 64 else word
    half = tl.where((c & 32) == 0, word, word >> 32) if N <= 64 else _near(word, far, c & 96)
    # The bit is moved to the sign: one shift and one comparison a pair.
    return (half.to(tl.uint32) << (31 - (c & 31)).to(tl.uint32)).to(tl.int32, bitcast=True) < 0


@triton.jit
def keep_by_bits(word, far, c, RUN: tl.constexpr):
    """Whether rows keep the keys at columns c of a tile with these words. RUN: N / 4 in the order of `in_runs`, else 0."""
    if RUN > 0:
        near = _near(word, far, ((c >> 1) & 3) * RUN)
        return (near & (1 << ((c >> 3) * 2 + (c & 1))).to(tl.uint32)) != 0
    else:
        return (_near(word, far, c) & 1) != 0


@triton.jit
def bounds(word, far, N: tl.constexpr):
    """[M, N]: inf for pairs that `keep_by_bits` keeps in the order of `in_runs`, -inf for others.

    The minimum with scores masks them. Unlike a choice it needs no predicates, which the compiler would pack and unpack, as it
    computes them while the matrix unit is at work. A score of NaN becomes inf, and its row NaN all the same.
    """
    c = tl.arange(0, N)[None, :]
    near = _near(word, far, ((c >> 1) & 3) * (N // 4)).to(tl.int32, bitcast=True)
    sign = (~near << (31 - ((c >> 3) * 2 + (c & 1)))) & -0x80000000
    return (sign | 0x7F800000).to(tl.float32, bitcast=True)
