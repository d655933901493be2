"""Columns and distances: sums of the attention of consecutive rows along both, over one reading of K and without a copy of it.

A program holds the cells of up to ROWS rows, one position after the other, and N keys. Turning row x by x keys puts cells of equal
distance below each other; those that run over the edge belong to N distances further on and are added apart.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch
from attnsieve.selection.fused.lse import row_lse
from attnsieve.selection.fused.rows import ProbedRows, Sides, head_of, keys_of, load_keys, load_rows, shape_of
from attnsieve.selection.sequence import SequenceQK

# Numbers held at once before they are added up: bounds memory, not the result.
SUMS_AT_ONCE = 1 << 28


@triton.jit
def _add_up(cells, own, first_key, start, n, p_column, p_offset, p_keys, p_distances, cut, EDGE: tl.constexpr):
    """Store the sums of cells [ROWS, N], of keys from `first_key` on and of `own` rows from position `start` on, see `slash_kernel`.
    EDGE: there are fewer rows than ROWS, or some do not read some keys."""
    ROWS: tl.constexpr = cells.shape[0]
    N: tl.constexpr = cells.shape[1]
    x, o = tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
    j = first_key + tl.arange(0, N)
    if cut is not None:
        cells = tl.where(cells >= cut, 1.0, 0.0)
    if EDGE:
        read = (x < own) & (o - x <= start - first_key)
        cells = tl.where(read, cells, 0.0)
    by_distance = cells
    # The first key's distance from row 0 stands here; that of key o from row x stands o - x behind.
    place = n - 1 - start + first_key
    if p_column is not None:
        of_column = tl.load(p_column + j, mask=j < n, other=0.0)
        p_cells = p_offset + place + (o - x)
        of_offset = tl.load(p_cells, mask=read, other=0.0) if EDGE else tl.load(p_cells)
        for_column = of_column[None, :] >= of_offset
        by_distance = tl.where(for_column, 0.0, cells)
        cells = tl.where(for_column, cells, 0.0)
    tl.store(p_keys + j, tl.sum(cells, 0), mask=j < n)

    turned = tl.gather(by_distance, (x + o) % N, 1)
    # Key x + o of row x has the distance of key o of row 0, and what runs over the edge that of the key N before.
    for over in tl.static_range(2):
        sums = tl.sum(tl.where((x + o < N) == (over == 0), turned, 0.0), 0)
        o_out = place - over * N + tl.arange(0, N)
        tl.store(p_distances + over * n + o_out, sums, mask=(o_out >= 0) & (o_out < n))


@triton.jit
def slash_kernel(
    q,
    position,
    lse,
    keys,
    column,
    offset,
    of_keys,
    of_distances,
    scale,
    cut,
    rows,
    first,
    count,
    shape,
    KV: tl.constexpr,
    GX: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    N: tl.constexpr,
):
    """of_keys [S * C, stretches, n] and of_distances [S * C, stretches, 2, n], to be added up over what lies between. Distances
    descend, so that a row's lie in memory as its keys do.

    A stretch is AT_ONCE of `count` rows from the first one on, whose positions ascend one by one. A cell counts the sum of its
    heads; with `cut` 1, if their mean is at least `cut`. With `column` and `offset`, float32 [S * C, n], it counts for the larger
    of the two alone, the column where they are equal.
    """
    i_x, i_c = tl.program_id(1), tl.program_id(2).to(tl.int64)
    GU: tl.constexpr = shape.G // GX
    i_sk = i_c // GU
    x = tl.arange(0, ROWS)
    own = tl.minimum(AT_ONCE, count - i_x * AT_ONCE)
    ok, y = x < own, first + i_x * AT_ONCE + x
    start = tl.load(position + first + i_x * AT_ONCE)
    first_key = tl.program_id(0) * N
    j = first_key + tl.arange(0, N)
    k_tile = load_keys(head_of(keys, i_sk, KV), keys, j, j >= 0, 0, shape)
    cells = tl.zeros([ROWS, N], tl.float32)
    for g_x in range(GX):
        g = i_c % GU + g_x + x * 0
        q_tile = load_rows(q + i_sk * rows * shape.D, y, g, ok, 0, shape)
        row_lse = tl.load(lse + i_sk * rows + y * shape.G + g, mask=ok, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=shape.PRECISION) * scale
        cells += tl.exp2(s - row_lse[:, None])
    if cut is not None:
        cells /= GX
    n = keys.tokens
    p_column, p_offset = None, None
    if column is not None:
        p_column, p_offset = column + i_c * n, offset + i_c * n
    o_out = i_c * tl.num_programs(1) + i_x
    p_keys, p_distances = of_keys + o_out * n, of_distances + o_out * 2 * n
    # Most programs need no predicate.
    if (own == ROWS) & (first_key + N <= start + 1):
        _add_up(cells, own, first_key, start, n, p_column, p_offset, p_keys, p_distances, cut, False)
    else:
        _add_up(cells, own, first_key, start, n, p_column, p_offset, p_keys, p_distances, cut, True)


def larger_shares(sequence: SequenceQK, rows: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """float32 [S, C, n] twice: the attention of the queries at `rows`, [P] ascending, the last of them one by one, by key and
    by distance; every cell is counted where the sum of all cells is larger, by key where they are equal."""
    cells = Cells.of(sequence, rows)
    column, offset = cells.sums(last, by=cells.sums(last))
    return column, offset.flip(-1)


def counts(sequence: SequenceQK, rows: Tensor, last: int, cut: float) -> tuple[Tensor, Tensor]:
    """As `larger_shares`: the number of cells, by key and by distance, that hold at least `cut`, exact in float32."""
    column, offset = Cells.of(sequence, rows).sums(last, cut=cut)
    return column, offset.flip(-1)


@dataclass(frozen=True)
class Stretch:
    """`count` probed positions from number `first` on, of which up to `at_once` lie next to each other."""

    first: int
    count: int
    at_once: int


@dataclass(frozen=True)
class Cells:
    """The attention of probed rows to keys k [S, K, n, D]. lse: float32 [S * K, R], of the rows; together: heads of a group are
    added up, C = K, else C is the number of query heads."""

    probed: ProbedRows
    k: Tensor
    lse: Tensor
    together: bool

    @classmethod
    def of(cls, sequence: SequenceQK, rows: Tensor) -> Cells:
        """Of the queries at `rows`, [P] ascending."""
        probed = ProbedRows.of(sequence, rows)
        return cls(probed, sequence.k, row_lse(probed, sequence.k)[0], sequence.together)

    @property
    def choices(self) -> int:
        """C / K."""
        return 1 if self.together else self.probed.group

    def sums(self, last: int, *, cut: float | None = None, by: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """float32 [S, C, n] twice: added up by key and by distance, which descends. The last `last` positions ascend one by one, those
        before are anywhere. See `slash_kernel` for `cut` and `by`, its column and offset."""
        earlier = len(self.probed.position) - last
        stretches = [Stretch(earlier, last, 64), Stretch(0, earlier, 1)]
        parts = [self._in_parts(stretch, cut, by) for stretch in stretches if stretch.count]
        columns, distances = zip(*parts, strict=True)
        return sum(columns[1:], columns[0]), sum(distances[1:], distances[0])

    def _in_parts(self, stretch: Stretch, cut: float | None, by: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`_sums` of as many KV heads at once as memory allows: rows that are anywhere have sums of their own before they are
        added."""
        sequences, kv_heads, n = self.k.shape[:3]
        at_once = SUMS_AT_ONCE // (3 * stretch.count // stretch.at_once * self.choices * n + 1)
        if at_once >= sequences * kv_heads:
            return self._sums(stretch, cut, by)
        at_once = max(1, at_once)
        columns = self.k.new_empty(sequences, kv_heads * self.choices, n, dtype=torch.float32)
        distances = torch.empty_like(columns)
        for s, start in product(range(sequences), range(0, kv_heads, at_once)):
            heads = slice(start, min(start + at_once, kv_heads))
            own = slice(heads.start * self.choices, heads.stop * self.choices)
            some_by = None if by is None else (by[0][s : s + 1, own], by[1][s : s + 1, own])
            found = self._of_heads(s, heads)._sums(stretch, cut, some_by)
            columns[s : s + 1, own], distances[s : s + 1, own] = found
        return columns, distances

    def _of_heads(self, s: int, heads: slice) -> Cells:
        """Of some KV heads of one sequence."""
        lse = self.lse.view(*self.k.shape[:2], -1)[s, heads]
        rows = replace(self.probed, q=self.probed.q[s : s + 1, heads])
        return replace(self, probed=rows, k=self.k[s : s + 1, heads], lse=lse)

    def _sums(self, stretch: Stretch, cut: float | None, by: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        probed, k = self.probed, self.k
        members = probed.group // self.choices
        sides = Sides.of(probed.q, min(stretch.count, stretch.at_once))
        at_once = min(stretch.at_once, sides.rows)
        heads, n = len(self.lse) * self.choices, k.shape[2]
        stretches = triton.cdiv(stretch.count, at_once)
        of_keys = k.new_empty(heads, stretches, n, dtype=torch.float32)
        of_distances = k.new_zeros(heads, stretches, 2, n, dtype=torch.float32)
        launch(
            slash_kernel,
            (triton.cdiv(n, sides.keys), stretches, heads),
            probed.q,
            probed.position,
            self.lse,
            keys_of(k),
            None if by is None else by[0].contiguous(),
            None if by is None else by[1].contiguous(),
            of_keys,
            of_distances,
            probed.scale,
            cut,
            probed.count,
            stretch.first,
            stretch.count,
            shape_of(probed.q),
            KV=k.shape[1],
            GX=members,
            ROWS=sides.rows,
            AT_ONCE=at_once,
            N=sides.keys,
            num_warps=4,
        )
        shape = (k.shape[0], -1, n)
        return (of_keys if stretches == 1 else of_keys.sum(1)).view(shape), of_distances.sum((1, 2)).view(shape)
