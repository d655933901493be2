"""Prefill of scattered diagonals, pair by pair: each row of a query tile reads the key and the value of its own distance.

Neighbouring diagonals read nearly the same keys, which the first cache keeps. There is nothing here for the matrix unit. A row goes
on from what key tiles have summed up of the rest of its keys, and its weights stay relative to the LSE of that: one step costs a
product and a sum for each number of K and V, and little beside. Where that does not do (a row without other keys, weights beyond
float32, a NaN or infinity in V at a key that the row keeps otherwise or not at all), a second launch computes the tile again with an
online softmax. In one kernel the second way costs the first one 2 % of its time.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.triton.common import LN2, LOG2E, Places, Rows, head_base, rows_of, rows_of_tile, span_of
from attnsieve.backends.triton.forward import Prefill
from attnsieve.backends.triton.geometry import Geometry, Tiles, rounding
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.nonfinite import is_finite
from attnsieve.backends.triton.outputs import new_outputs
from attnsieve.backends.triton.scattered import Scattered

# Less than any row.
_NEVER = tl.constexpr(-(2**31))
# Numbers of q that a program holds.
_NUMBERS = 2**14
# Query tiles that are begun before the next layout heads' are: enough for all multiprocessors until the last ones, which are short.
_BEGUN = 256
# What looks for tiles to attend to again, and how many of them each program looks up at a time.
_PROGRAMS = 128
_LOOKED_UP = tl.constexpr(256)


class Distances(NamedTuple):
    """What kernels read of `Scattered`: offsets [H, room], below [2, H, tiles] for query tiles of as many positions as theirs."""

    offsets: Any
    below: Any
    room: Any
    tiles: Any


class Ends(NamedTuple):
    """Of the layout without the diagonals, of n positions: ends int32 [H, n], corner_rows int32 [H] or None."""

    ends: Any
    corner_rows: Any
    n: Any


@triton.jit
def _wide(x):
    """float32 numbers; of bfloat16 in one instruction each, where the compiler takes one and a half."""
    if x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _load(p, ok):
    """Numbers in float32, 0 where not ok; all are if that is None."""
    return _wide(tl.load(p) if ok is None else tl.load(p, mask=ok, other=0.0))


@triton.jit
def _halves(i, D: tl.constexpr):
    """Where numbers of rows i [R] lie in a row, in halves [R or 1, D / 2]. A thread holds 8 numbers of each, so that D / 16 threads
    repeat what is done once per pair. The first cache gives out 128 bytes at a time, halves of two rows at width 64: of different
    banks, since every second row is turned."""
    o_d = tl.arange(0, D // 2)[None, :]
    turn = (i & 1)[:, None] * 32 if D == 64 else 0
    return turn + o_d, D // 2 - turn + o_d


@triton.jit
def _at(rows, halves, s_row):
    """Where the numbers of rows [R] of so many lie, in halves."""
    start = rows[:, None] * s_row
    return start + halves[0], start + halves[1]


@triton.jit
def _second(p, at, D: tl.constexpr):
    """Addresses of second halves: of whole rows at a constant distance, which takes no instruction."""
    return p + at[1] if D == 64 else p + D // 2 + at[0]


@triton.jit
def _dot(q_low, q_high, p_k, at, D: tl.constexpr):
    """Products [R] of rows of q, in halves, with the rows of K at `at`."""
    s = _sums_of_threads(q_low * _load(p_k + at[0], None))
    s += _sums_of_threads(q_high * _load(_second(p_k, at, D), None))
    return tl.sum(s, 1)


@triton.jit
def _sums_of_threads(x):
    """Sums [R, D / 16] of the numbers of a row's half that one thread holds: both halves are then passed on between threads as one."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 2)


@triton.jit
def _add(low, high, weight, p_v, at, ok, D: tl.constexpr):
    """Sums, in halves, plus weight [R] times the rows of V at `at`."""
    low += weight[:, None] * _load(p_v + at[0], ok)
    high += weight[:, None] * _load(_second(p_v, at, D), ok)
    return low, high


@triton.jit
def _edge_pair(rows, keys, distance, D: tl.constexpr):
    """Of rows some of which lie, or are led by a distance, outside the text: where their keys' rows are, whether they keep them, and
    products."""
    q_low, q_high, i, halves, end, last = rows
    p_k, _, p_bias, s_bias, p_end = keys
    # Rows beyond the text read as its last row.
    i = tl.minimum(i, end)
    j = tl.maximum(i - distance, 0)
    keep = (i >= distance) & (tl.load(p_end + j) <= last)
    at = _at(j, halves, D)
    s = _dot(q_low, q_high, p_k, at, D)
    if p_bias is not None:
        s += tl.load(p_bias + j * s_bias)
    return at, keep, s


@triton.jit
def _add_relative(low, high, total, base, rows, keys, p_offset, inside, count, scale, D: tl.constexpr):
    """Sums low and high [R, D / 2] and total [R] with weights relative to base [R] of a head's first `count` diagonals, of which
    `inside` lead every row to a key. rows: queries in halves, positions, which halves those are, the text's last position, and the
    greatest end of keys that rows keep by their distance alone; keys: addresses of K, V, the bias with its stride, and ends."""
    q_low, q_high, i, halves, _, last = rows
    p_k, p_v, p_bias, s_bias, p_end = keys
    at = _at(i, halves, D)
    p_row_end = p_end + i
    distance = tl.load(p_offset)
    for _ in tl.range(0, inside, num_stages=1):
        back = distance * D
        keep = tl.load(p_row_end - distance) <= last
        s = _dot(q_low, q_high, p_k - back, at, D)
        if p_bias is not None:
            s += tl.load(p_bias + (i - distance) * s_bias)
        weight = tl.where(keep, tl.exp2(s * scale - base), 0.0)
        low, high = _add(low, high, weight, p_v - back, at, None, D)
        total += weight
        # By the loop's own number the compiler would count in 64 bits, two instructions more a step.
        p_offset += 1
        distance = tl.load(p_offset)
    for _ in tl.range(inside, count, num_stages=1):
        edge, keep, s = _edge_pair(rows, keys, distance, D)
        weight = tl.where(keep, tl.exp2(s * scale - base), 0.0)
        low, high = _add(low, high, weight, p_v, edge, keep[:, None], D)
        total += weight
        p_offset += 1
        distance = tl.load(p_offset)
    return low, high, total


@triton.jit
def _add_online(low, high, total, peak, rows, keys, p_offset, count, scale, D: tl.constexpr):
    """`_add_relative` by an online softmax from peak [R] on; reads no value of a key that a row does not keep."""
    distance = tl.load(p_offset)
    for _ in tl.range(0, count, num_stages=1):
        edge, keep, s = _edge_pair(rows, keys, distance, D)
        s = tl.where(keep, s * scale, -float("inf"))
        new_peak = tl.maximum(peak, s)
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight, fade = tl.exp2(s - base), tl.exp2(peak - base)
        low, high = _add(low * fade[:, None], high * fade[:, None], weight, keys[1], edge, keep[:, None], D)
        total = total * fade + weight
        peak = new_peak
        p_offset += 1
        distance = tl.load(p_offset)
    return low, high, total, tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _attend_to_tile(
    tensors,
    ends,
    distances,
    scale,
    q_slots,
    h,
    t,
    span,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Query tile t of layout head h, see `diagonals_kernel`; 1 if it has to be attended to again, ONLINE, else 0."""
    q, k, v, bias, part, p_part_lse, out, p_lse = tensors
    batch, _, _, k_start, k_len = span
    i, head, slot, row_ok = rows_of_tile(tl.arange(0, M * GP), h, t, span, G, GP, M)
    kv_head = h // G if GP == 1 else h
    heads = H if GP == 1 else H * G
    at_lse = (batch * heads + head) * q_slots + slot
    ok = row_ok[:, None]
    halves = _halves(i, D)
    at_q, at_part = _at(slot, halves, q.s_row), _at(slot, halves, part.s_row)
    p_q = head_base(q, batch, head)[:, None]
    q_low, q_high = _load(p_q + at_q[0], ok), _load(_second(p_q, at_q, D), ok)
    p_part = head_base(part, batch, head)[:, None]
    low, high = _load(p_part + at_part[0], ok), _load(_second(p_part, at_part, D), ok)
    # Rows that are no queries weigh nothing.
    peak = tl.load(p_part_lse + at_lse, mask=row_ok, other=float("inf")) * LOG2E
    empty = peak == -float("inf")
    base = tl.where(empty, 0.0, peak)
    total = tl.where(empty, 0.0, 1.0)
    p_k = head_base(k, batch, kv_head) + k_start * k.s_row
    p_v = head_base(v, batch, kv_head) + k_start * v.s_row
    p_bias, s_bias = None, 0
    if bias is not None:
        p_bias = head_base(bias, batch, kv_head) + k_start * bias.s_row
        s_bias = bias.s_row
    # A row keeps a key by its distance alone where the rest does not keep it by `end`, so where that is at most the row; rows of a
    # corner follow the corner.
    last = i
    if ends.corner_rows is not None:
        last = tl.where(i >= tl.load(ends.corner_rows + h), i, _NEVER)
    rows, keys = (q_low, q_high, i, halves, k_len - 1, last), (p_k, p_v, p_bias, s_bias, ends.ends + h * ends.n)
    p_offset = distances.offsets + h * distances.room
    p_below = distances.below + h * distances.tiles + t
    count = tl.load(p_below + H * distances.tiles)
    again = tl.full([], 0, tl.int32)
    if ONLINE:
        low, high, total, base = _add_online(low, high, total, peak, rows, keys, p_offset, count, scale * LOG2E, D)
    else:
        inside = tl.where((t + 1) * M <= k_len, tl.load(p_below), 0)
        low, high, total = _add_relative(low, high, total, base, rows, keys, p_offset, inside, count, scale * LOG2E, D)
        # Weights of finite values can add up beyond float32 where their products with small values do not.
        beyond = tl.max(((empty & row_ok) | (total == float("inf"))).to(tl.int32), 0) == 1
        again = (beyond | (is_finite(low) == 0) | (is_finite(high) == 0)).to(tl.int32)

    nothing = total == 0
    share = (1 / tl.where(nothing, 1.0, total))[:, None]
    at_out = _at(slot, halves, out.s_row)
    p_out = head_base(out, batch, head)[:, None]
    tl.store(p_out + at_out[0], (low * share).to(out.p.dtype.element_ty), mask=ok)
    tl.store(_second(p_out, at_out, D), (high * share).to(out.p.dtype.element_ty), mask=ok)
    tl.store(p_lse + at_lse, tl.where(nothing, -float("inf"), (base + tl.log2(total)) * LN2), mask=row_ok)
    return again


@triton.jit
def _tile_of(x, y, query_tiles, together, k_len, H: tl.constexpr, GP: tl.constexpr, M: tl.constexpr):
    """Layout head and query tile of program (x, y) of a sequence: where heads have masks of their own, the longest tiles of `together`
    heads first, then those of the next ones, and y is 0; else those of head y. Without a division h is the same for all threads to the
    compiler too, which keeps addresses in registers that they share: shared masks have none to spare."""
    if GP == 1:
        first = x // (query_tiles * together) * together
        heads = tl.minimum(H - first, together)
        own = x - first * query_tiles
        h, behind = first + own % heads, own // heads
    else:
        h, behind = y, x
    return h, tl.cdiv(k_len, M) - 1 - behind


@triton.jit
def diagonals_kernel(
    q,
    k,
    v,
    bias,
    part,
    p_part_lse,
    out,
    p_lse,
    p_again,
    places,
    ends,
    distances,
    scale,
    q_slots,
    query_tiles,
    together,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
):
    """part [B, Hq, Tq, D], p_part_lse [B, Hq, Tq], of the rest of the keys -> out, p_lse; K and V with rows of D numbers in
    succession; rows of a program as in `forward_kernel`. p_again gets 1 for each program whose tile `diagonals_again_kernel` is needed
    for, else 0."""
    x, y, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span = span_of(places, i_s)
    _, _, first, _, k_len = span
    h, t = _tile_of(x, y, query_tiles, together, k_len, H, GP, M)
    again = tl.full([], 0, tl.int32)
    if (t >= 0) & ((t + 1) * M > first):
        tensors = (q, k, v, bias, part, p_part_lse, out, p_lse)
        again = _attend_to_tile(tensors, ends, distances, scale, q_slots, h, t, span, H, G, GP, M, D, False)
    tl.store(p_again + (i_s * tl.num_programs(1) + y) * tl.num_programs(0) + x, again)


@triton.jit
def diagonals_again_kernel(
    q,
    k,
    v,
    bias,
    part,
    p_part_lse,
    out,
    p_lse,
    p_again,
    places,
    ends,
    distances,
    scale,
    q_slots,
    query_tiles,
    together,
    total,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
):
    """Attends once more to the tiles of those of `total` programs that `diagonals_kernel` marked in p_again."""
    in_x: tl.constexpr = H if GP == 1 else 1
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0), total, programs * _LOOKED_UP):
        own = start + tl.arange(0, _LOOKED_UP) * programs
        if tl.max(tl.load(p_again + own, mask=own < total, other=0), 0) == 1:
            for z in range(start, tl.minimum(total, start + programs * _LOOKED_UP), programs):
                if tl.load(p_again + z) == 1:
                    x, y = z % (query_tiles * in_x), z // (query_tiles * in_x) % (H // in_x)
                    span = span_of(places, z // (query_tiles * H))
                    _, _, _, _, k_len = span
                    h, t = _tile_of(x, y, query_tiles, together, k_len, H, GP, M)
                    tensors = (q, k, v, bias, part, p_part_lse, out, p_lse)
                    _attend_to_tile(tensors, ends, distances, scale, q_slots, h, t, span, H, G, GP, M, D, True)


class PrefillInParts:
    """`Prefill` for layouts with scattered diagonals: the rest of the layout, then those."""

    def __init__(self, call: Call, rest: Prefill, parts: Scattered) -> None:
        self._rest = rest
        geometry = _geometry(call)
        below, constants = parts.below(geometry.positions), geometry.constants()
        distances = Distances(parts.offsets, below, parts.offsets.shape[1], below.shape[2])
        ends = Ends(parts.rest.end[0].contiguous(), call.layout.corner_rows, call.layout.length)
        self._total = geometry.total
        tiles, heads = geometry.query_tiles, call.layout.heads
        grid = (tiles * heads, 1) if geometry.packed == 1 else (tiles, heads)
        numbers = (call.scale, call.q.shape[2], tiles, _together(geometry))
        options = {name: constants[name] for name in ("H", "G", "GP", "M", "D")} | geometry.options() | rounding(call)
        looking = (min(self._total, _PROGRAMS), 1, 1)
        self._launches = [
            Launch(diagonals_kernel, (*grid, len(call.spans)), ends, distances, *numbers, **options),
            Launch(diagonals_again_kernel, looking, ends, distances, *numbers, self._total, **options),
        ]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Rows | None, places: Places) -> tuple[Tensor, Tensor]:
        part, part_lse = self._rest(q, k, v, bias, places)
        out, lse = new_outputs(q, v)
        again = torch.empty(self._total, dtype=torch.int32, device=q.device)
        k, v = k.contiguous(), v.contiguous()
        for launch in self._launches:
            launch(rows_of(q), rows_of(k), rows_of(v), bias, rows_of(part), part_lse, rows_of(out), lse, again, places)
        return out, lse


def _geometry(call: Call) -> Geometry:
    """32 warps of 64 registers a thread; half as many where the heads of a KV group share a mask, so that threads hold rows of several
    heads and read their key once."""
    geometry = Geometry(call, Tiles(rows=_NUMBERS // call.q.shape[-1], keys=64, warps=32, stages=1))
    return geometry if geometry.packed == 1 else replace(geometry, tiles=replace(geometry.tiles, warps=16))


def _together(geometry: Geometry) -> int:
    """How many layout heads' tiles are begun together, where heads have masks of their own: all those that read the same keys, of one
    KV head or several. All tiles of one head after those of another would leave multiprocessors idle at the end, all heads' at once
    would need more keys than the second cache holds."""
    group = geometry.call.group
    return group * max(1, _BEGUN // (geometry.query_tiles * group))
