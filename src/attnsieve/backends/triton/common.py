"""What every kernel shares: argument bundles, where a program's rows lie, and the mask's predicate.

Names: t a query tile of M positions, b a key tile of N keys, R = M * GP rows of a program (GP query heads of a KV head packed
as rows, a power of two), z 0 or the sequence, where each has masks of its own, h a layout head, i a query position, j a key position.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.triton.bits import block_words, bounds, in_runs, keep_by_bits, keep_by_offset, tile_words
from attnsieve.spans import Spans

# Which keys may be served by lists of single keys: none, those flagged by a complemented end, all that `end` keeps, or those
# of blocks narrower than long, where neither `end` nor an offset keeps them.
LISTED_NOTHING = tl.constexpr(0)
LISTED_FLAGGED = tl.constexpr(1)
LISTED_ALL = tl.constexpr(2)
LISTED_BLOCKS = tl.constexpr(3)
# A cut above every position: lists serve all that they may.
NO_CUT = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A [B, H, T, width] tensor with contiguous last dimension: address and strides in elements."""

    p: Any
    s_batch: Any
    s_head: Any
    s_row: Any


class Places(NamedTuple):
    """The five vectors of `Spans` and their strides."""

    p_batch: Any
    p_q_start: Any
    p_q_len: Any
    p_k_start: Any
    p_k_len: Any
    s_batch: Any
    s_q_start: Any
    s_q_len: Any
    s_k_start: Any
    s_k_len: Any


class Mask(NamedTuple):
    """The vectors of a layout as the predicate reads them; see `attnsieve.layout.Layout` and `schedule.Schedule`.

    ends int32 [Z, H, n]; words int32 [Z, H, n_words] or None; corner uint8 [H, L, L_bytes] and corner_rows int32 [H] or None;
    block_bits int32 [Z, H, blocks, block_words] or None; cut int32 [Z, H, T] or None. Where all ends are columns or windows, the
    windows are among the words, and columns int32 [Z, H, column_words] holds a bit for each key that no row drops; listed, in
    the same shape, for those in lists. Else both are None.
    """

    ends: Any
    words: Any
    corner: Any
    corner_rows: Any
    block_bits: Any
    cut: Any
    columns: Any
    listed: Any
    n: Any
    n_words: Any
    column_words: Any
    corner_side: Any
    corner_bytes: Any
    n_blocks: Any
    block_words: Any
    tiles: Any


class Lists(NamedTuple):
    """One list per (z, h, tile): items[start : start + count], the first `whole` of which need no predicate."""

    start: Any
    whole: Any
    count: Any
    items: Any


class Marks(NamedTuple):
    """Which rows keep the keys of lists of single keys, see `single_keys.list_keys`: words int64 [Z, H, tiles, chunks, M]."""

    words: Any
    chunks: Any


def rows_of(tensor: Tensor) -> Rows:
    """The bundle of a tensor, copied first if its last dimension is not contiguous."""
    s_batch, s_head, s_row, s_last = tensor.stride()
    if s_last != 1:
        tensor = tensor.contiguous()
        s_batch, s_head, s_row, _ = tensor.stride()
    return Rows(tensor, s_batch, s_head, s_row)


def places_of(spans: Spans) -> Places:
    vectors = (spans.batch, spans.q_start, spans.q_len, spans.k_start, spans.k_len)
    return Places(*vectors, *(vector.stride(0) for vector in vectors))


@triton.jit
def rows_of_tile(r, h, t, span, G: tl.constexpr, GP: tl.constexpr, M: tl.constexpr):
    """Of rows r of a query tile: positions, heads, where in q and in the LSE they are, and whether they are rows of queries."""
    _, q_start, first, _, k_len = span
    i = t * M + r % M
    head = h if GP == 1 else h * G + r // M
    return i, head, q_start + i - first, (i >= first) & (i < k_len) & (r // M < G)


@triton.jit
def span_of(places, i_s):
    """Batch row, first query slot, first query position, first key slot and number of positions of sequence i_s."""
    batch = tl.load(places.p_batch + i_s * places.s_batch)
    q_start = tl.load(places.p_q_start + i_s * places.s_q_start)
    k_start = tl.load(places.p_k_start + i_s * places.s_k_start)
    k_len = tl.load(places.p_k_len + i_s * places.s_k_len).to(tl.int32)
    first = k_len - tl.load(places.p_q_len + i_s * places.s_q_len).to(tl.int32)
    return batch, q_start, first, k_start, k_len


@triton.jit
def head_base(x, batch, head):
    return x.p + batch.to(tl.int64) * x.s_batch + head.to(tl.int64) * x.s_head


@triton.jit
def load_rows(p_base, slots, s_row, ok, DIM: tl.constexpr, WIDTH: tl.constexpr, GUARD: tl.constexpr):
    """[slots, WIDTH] of a [slots, DIM] tensor, zero beyond DIM and, with GUARD, where `ok` is false."""
    o_d = tl.arange(0, WIDTH)
    p_x = (p_base + slots.to(tl.int64) * s_row)[:, None] + o_d[None, :]
    if GUARD and DIM != WIDTH:
        return tl.load(p_x, mask=ok[:, None] & (o_d < DIM)[None, :], other=0.0)
    elif GUARD:
        return tl.load(p_x, mask=ok[:, None], other=0.0)
    elif DIM != WIDTH:
        return tl.load(p_x, mask=(o_d < DIM)[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def scores(q_tile, k_tile, p_bias, s_bias, j, ok, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T + bias / scale, [R, N].

    The bias of a key takes 16 bytes, so that the compiler sends it through shared memory with K; a vector it loads in the layout
    of the scores, 16 times over.
    """
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if p_bias is not None:
        s += tl.sum(load_rows(p_bias, j, s_bias, ok, 4, 4, GUARD), 1)[None, :]
    return s


@triton.jit
def single_list(singles, marks, o_list, N: tl.constexpr):
    """Of a query tile's list of single keys: its address, the order [N] in which a chunk's keys are taken, how many chunks need no
    predicate, and how many keys there are."""
    order = tl.arange(0, N) if marks is None else in_runs(tl.arange(0, N), N)
    p_items = singles.items + tl.load(singles.start + o_list)
    return p_items, order, tl.load(singles.whole + o_list) // N, tl.load(singles.count + o_list)


@triton.jit
def keys_to_read(listed, o, count, own, k_len):
    """Entries o of a list, as keys that can be read: `own` beyond the list's end, the last key beyond the sequence's."""
    return tl.minimum(tl.where(o < count, listed, own), k_len - 1)


@triton.jit
def corner_bits(mask, h, i, j, ok):
    """Bits of the captured corner."""
    p_byte = mask.corner + (h * mask.corner_side + i).to(tl.int64) * mask.corner_bytes + (j >> 3)
    byte = tl.load(p_byte, mask=ok, other=0).to(tl.int32)
    return ((byte >> (j & 7)) & 1) != 0


@triton.jit
def tile_keep(mask, o_zh, h, i, j, j0, ok, cut, N: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr):
    """The pairs that key tile j0 serves: all that the layout keeps, less those that a list serves (see `Schedule`).

    i and j broadcast against each other, as everywhere here: rows by keys, with RUNS in the order of `bits.tile_keys`; or keys
    by rows in the backward pass.
    """
    if mask.columns is not None:
        word, far = tile_words(mask, o_zh, i, j0, cut, N, BLOCK)
        keep = keep_by_bits(word, far, tl.arange(0, N)[None, :] if RUNS else j - j0, N // 4 if RUNS else 0)
    else:
        keep = _keep_by_ends(mask, o_zh, i, j, j0, ok, cut, N, LISTED, BLOCK)
    if mask.corner is not None:
        inside = i < tl.load(mask.corner_rows + h)
        keep = tl.where(inside, corner_bits(mask, h, i, j, inside & (j <= i)) & (j <= i), keep)
    return keep


@triton.jit
def masked(s, word, far, mask, o_zh, i, j, j0, ok, cut, N: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Scores [M, N] of rows i and the keys of tile j0 in the order of `bits.tile_keys`, -inf where the tile does not serve them.

    For rows outside the corner. word, far: the tile's, from `bits.tile_words`.
    """
    if mask.columns is not None:
        return tl.minimum(s, bounds(word, far, N))
    else:
        keep = _keep_by_ends(mask, o_zh, i[:, None], j[None, :], j0, ok[None, :], cut, N, LISTED, BLOCK)
        return tl.where(keep, s, -float("inf"))


@triton.jit
def _keep_by_ends(mask, o_zh, i, j, j0, ok, cut, N: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """`tile_keep` for any ends, outside the corner."""
    end = tl.load(mask.ends + o_zh * mask.n + j, mask=ok, other=0)
    other_end = end * 0
    if LISTED == LISTED_FLAGGED:
        leave = (end < 0) & (j0 < cut)
        end = tl.where(end < 0, ~end, end)
        other_end = tl.where(leave, end, 0)
        end = tl.where(leave, 0, end)
    if LISTED == LISTED_ALL:
        other_end = tl.where(j0 < cut, end, 0)
        end = tl.where(j0 < cut, 0, end)
    keep = i < end
    if mask.words is not None or mask.block_bits is not None:
        extra = i < 0
        if mask.words is not None:
            extra = extra | keep_by_offset(mask, o_zh, i, j - j0, j0, N)
        if mask.block_bits is not None:
            extra = extra | ((block_words(mask, o_zh, i, j0, j, N, BLOCK) & 1) != 0)
        if LISTED != LISTED_NOTHING:
            extra = extra & (i >= other_end)
        keep = keep | extra
    return keep & (j <= i)


@triton.jit
def list_keep(mask, o_zh, i, j, j_load, cut, ok, LISTED: tl.constexpr):
    """The pairs that listed keys j serve: what `end` keeps, before the cut. `j_load` equals j; ends are loaded at it."""
    if LISTED == LISTED_FLAGGED:
        # No row drops a flagged key.
        keep = ok & (j_load < cut) & (j <= i)
        return keep
    end = tl.load(mask.ends + o_zh * mask.n + j_load, mask=ok, other=0)
    if LISTED == LISTED_BLOCKS:
        keep = ok & (j <= i) & (i >= end)
        if mask.words is not None:
            at = mask.n_words * 32 - 512 - tl.maximum(i - j, 0)
            word = tl.load(mask.words + o_zh * mask.n_words + (at >> 5), mask=keep, other=0)
            keep = keep & (((word >> (at & 31)) & 1) == 0)
        return keep
    if mask.cut is not None:
        end = tl.where(j_load < cut, end, 0)
    return (j <= i) & (i < end)


@triton.jit
def listed_scores(s, mask, marks, rows, chunk, cut, M: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr):
    """Scores [R, N] of rows and a chunk of a list of single keys, -inf where the list does not serve them.

    rows: o_zh, the list's number, positions i [R] and those within the tile [R]. chunk: the list's address, which chunk x it is, how
    many of its chunks need no predicate (this one does), and how many keys it has.
    """
    o_zh, o_list, i, row = rows
    p_singles, x, n_whole, n_singles = chunk
    if marks is not None:
        p_words = marks.words + (o_list * marks.chunks + x - n_whole) * M + row
        word = tl.load(p_words).to(tl.uint64, bitcast=True)[:, None]
        return tl.minimum(s, bounds(word, word, N))
    else:
        o = x * N + tl.arange(0, N)
        ok = o < n_singles
        # Loaded here, so that the predicate is computed in the layout of the scores.
        j = tl.load(p_singles + o)
        keep = list_keep(mask, o_zh, i[:, None], j[None, :], j[None, :], cut, ok[None, :], LISTED)
        return tl.where(keep & ok[None, :], s, -float("inf"))
