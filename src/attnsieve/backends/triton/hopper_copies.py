"""The producer of `hopper_forward`: a group of four warps that copies Q, K and V into shared memory; and where a tile lies."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# A name has one type in Gluon, so that `_` cannot stand for whatever is not used.
# ruff: noqa: RUF059
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from attnsieve.backends.triton import common
from attnsieve.backends.triton.bits import in_runs

# The same functions, compiled as Gluon.
_span_of, _in_runs = gluon.jit(common.span_of.fn), gluon.jit(in_runs.fn)
rows_of_tile, head_base = gluon.jit(common.rows_of_tile.fn), gluon.jit(common.head_base.fn)


@gluon.jit
def tile_of(places, mask, x, tiles, H: gl.constexpr, OWN_MASKS: gl.constexpr, M: gl.constexpr):
    """Of tile x of all: layout head, query tile, its list, whether it has queries, and its span. The longest lists come first."""
    h, i_s = x % H, x // H // tiles
    batch, q_start, first, k_start, k_len = _span_of(places, i_s)
    t = gl.cdiv(k_len, M) - 1 - x // H % tiles
    o_list = ((i_s.to(gl.int64) if OWN_MASKS else i_s.to(gl.int64) * 0) * H + h) * mask.tiles + gl.maximum(t, 0)
    return h, t, o_list, (t >= 0) & ((t + 1) * M > first), (batch, q_start, first, k_start, k_len)


@gluon.jit
def list_of(singles, places, mask, x, tiles, total, H: gl.constexpr, OWN_MASKS: gl.constexpr, M: gl.constexpr):
    """Start, length and number of whole keys of the list of tile x, of which nothing is used if there is no such tile."""
    h, t, o_list, there, span = tile_of(places, mask, gl.minimum(x, total - 1), tiles, H, OWN_MASKS, M)
    return gl.load(singles.start + o_list), gl.load(singles.count + o_list), gl.load(singles.whole + o_list)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers, which turns with every round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def chunks_of(count, N: gl.constexpr, TAIL: gl.constexpr):
    """How many chunks of N keys a list has, and whether it ends with a tail, at most TAIL keys that come along with the first chunk.

    Rows that keep 1024 keys make lists of 1024 keys and a few.
    """
    short = (count > N) & (count % N > 0) & (count % N <= TAIL)
    return gl.maximum(gl.where(short, count // N, gl.cdiv(count, N)), 1), short


@gluon.jit
def _copy_keys(tile, p_base, j, s_row, D: gl.constexpr, wide: gl.constexpr):
    """Queue the copies of rows j of K or V. The addresses of a row are added up in 64 bits of one multiplication in 32."""
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    o_row = j.to(gl.uint32).to(gl.int64) * s_row.to(gl.uint32).to(gl.int64)
    async_copy.async_copy_global_to_shared(tile, (p_base + o_row)[:, None] + o_d[None, :])


@gluon.jit
def produce(
    copied,
    H: gl.constexpr,
    OWN_MASKS: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Copy every tile's rows of Q and its list's tail, then chunk by chunk the keys of its list, in the order of `in_runs`, with bias
    and values."""
    q, k, v, bias, places, mask, singles, tiles, total, room, barriers = copied
    q_tile, k_tiles, v_tiles, b_tiles, k_tail, v_tail, b_tail = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty = barriers
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_n = _in_runs(gl.arange(0, N, layout=gl.SliceLayout(1, wide)), N)
    o_f = _in_runs(gl.arange(0, N, layout=flat), N)
    o_tail = _in_runs(gl.arange(0, TAIL, layout=gl.SliceLayout(1, wide)), TAIL)
    o_tail_f = _in_runs(gl.arange(0, TAIL, layout=flat), TAIL)
    r = gl.arange(0, M * GP, layout=gl.SliceLayout(1, wide))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    n_tiles, n_tails, stage, phase = 0, 0, 0, 1
    ahead = list_of(singles, places, mask, gl.program_id(0), tiles, total, H, OWN_MASKS, M)
    for x in range(gl.program_id(0), total, gl.num_programs(0)):
        h, t, o_list, there, span = tile_of(places, mask, x, tiles, H, OWN_MASKS, M)
        start, count, n_whole = ahead
        ahead = list_of(singles, places, mask, x + gl.num_programs(0), tiles, total, H, OWN_MASKS, M)
        if there:
            batch, q_start, first, k_start, k_len = span
            n_chunks, has_tail = chunks_of(count, N, TAIL)
            # Lists end with spare entries; beyond a list's end its tile's first key is read.
            p_list = singles.items + start
            j, few = gl.load(p_list + o_n), gl.load(p_list + o_f)
            rest = n_chunks * N
            j_tail, few_tail = gl.load(p_list + rest + o_tail), gl.load(p_list + rest + o_tail_f)
            i, head, slot, ok = rows_of_tile(r, h, t, span, G, GP, M)
            p_q = head_base(q, batch, head) + slot * q.s_row
            mbarrier.wait(q_empty, (n_tiles & 1) ^ 1)
            async_copy.async_copy_global_to_shared(q_tile, p_q[:, None] + o_d[None, :], mask=ok[:, None])
            async_copy.mbarrier_arrive(q_full, increment_count=False)
            n_tiles += 1
            kv_head = h // G if GP == 1 else h
            p_k = head_base(k, batch, kv_head) + k_start * k.s_row
            p_v = head_base(v, batch, kv_head) + k_start * v.s_row
            if has_tail:
                here = gl.minimum(gl.where(rest + o_tail < count, j_tail, t * M), k_len - 1)
                mbarrier.wait(tail_empty, (n_tails & 1) ^ 1)
                if bias is not None:
                    alone = gl.minimum(gl.where(rest + o_tail_f < count, few_tail, t * M), k_len - 1)
                    p_bias = head_base(bias, batch, kv_head) + (k_start + alone) * bias.s_row
                    async_copy.async_copy_global_to_shared(b_tail, p_bias)
                _copy_keys(k_tail, p_k, here, k.s_row, D, wide)
                _copy_keys(v_tail, p_v, here, v.s_row, D, wide)
                async_copy.mbarrier_arrive(tail_full, increment_count=False)
                n_tails += 1
            for y in range(0, n_chunks):
                here = gl.minimum(gl.where(y * N + o_n < count, j, t * M), k_len - 1)
                alone = gl.minimum(gl.where(y * N + o_f < count, few, t * M), k_len - 1)
                # Looked up one step ahead.
                j, few = gl.load(p_list + (y + 1) * N + o_n), gl.load(p_list + (y + 1) * N + o_f)
                mbarrier.wait(k_empty.index(stage), phase)
                if bias is not None:
                    p_bias = head_base(bias, batch, kv_head) + (k_start + alone) * bias.s_row
                    async_copy.async_copy_global_to_shared(b_tiles.index(stage), p_bias)
                _copy_keys(k_tiles.index(stage), p_k, here, k.s_row, D, wide)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                _copy_keys(v_tiles.index(stage), p_v, here, v.s_row, D, wide)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                stage, phase = next_stage(stage, phase, STAGES)
