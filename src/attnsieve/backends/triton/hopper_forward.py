"""Prefill by lists of single keys on Hopper GPUs, in Gluon: some warps copy, others compute.

The kernel computes what `forward.forward_kernel` does, for lists that serve every pair. Triton's warps copy and compute in turn, and
every tile of queries begins with a chain of loads that nothing hides. Here one program per multiprocessor goes through many tiles.
A group of four warps, the producer, copies Q, K and V into shared memory, as far ahead as there is room for; two groups, the
consumers, each own 64 of a tile's 128 rows. They hand over by barriers in shared memory: `full` when a stage was copied, `empty` when
both consumers have read it. The order of a consumer's steps lets the matrix unit work while it computes exponentials.

Rows whose sums are not finite get an LSE of NaN, by which `forward.again_kernel` finds the tiles to compute again (see `nonfinite`).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# A name has one type in Gluon, so that `_` cannot stand for whatever is not used.
# ruff: noqa: RUF059
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnsieve.backends.triton.common import LN2 as _LN2
from attnsieve.backends.triton.common import LOG2E as _LOG2E
from attnsieve.backends.triton.geometry import Geometry, Tiles, rounding
from attnsieve.backends.triton.hopper_copies import chunks_of, head_base, list_of, next_stage, produce, rows_of_tile, tile_of
from attnsieve.backends.triton.hopper_softmax import base_of, masked, parts_of, peaks_of, weights_of, words_of
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.schedule import Schedule

LOG2E, LN2 = gl.constexpr(_LOG2E.value), gl.constexpr(_LN2.value)

# Four stages of keys and values, and one tile of queries, fill most of a multiprocessor's shared memory. Registers are those of a
# consumer's thread; the producer's get what is left of 504 for three.
TILES = Tiles(rows=128, keys=64, warps=4, stages=4, registers=208)
# Keys behind a list's whole chunks that go along with its first, so that they do not take the time of a chunk.
TAIL = 16


def prefill(geometry: Geometry, built: Schedule, programs: int) -> Launch:
    """What launches the kernel for calls like the geometry's, whose tiles are TILES but for how they are spread over warps."""
    call, constants = geometry.call, geometry.constants()
    return Launch(
        forward_hopper,
        (programs, 1, 1),
        built.mask,
        built.singles,
        built.marks,
        call.scale,
        call.q.shape[2],
        geometry.query_tiles,
        geometry.total,
        **{name: constants[name] for name in ("H", "OWN_MASKS", "G", "GP", "M", "N", "D")},
        STAGES=TILES.stages,
        TAIL=TAIL,
        REGISTERS=TILES.registers,
        num_warps=TILES.warps,
        **rounding(call),
    )


@gluon.jit
def _store(
    out,
    p_lse,
    acc,
    weight,
    peak,
    r0,
    h,
    t,
    span,
    q_slots,
    H: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    M: gl.constexpr,
):
    """Store outputs and LSE of the rows from r0 on of a tile: sums acc [R, D] and weight [R] relative to peak [R]. Returns [R]
    whether a row's LSE is NaN."""
    R: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    sums: gl.constexpr = acc.type.layout
    rows: gl.constexpr = peak.type.layout
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    empty = weight == 0
    acc = acc / gl.convert_layout(gl.where(empty, 1.0, weight), gl.SliceLayout(1, sums))[:, None]
    lse = gl.where(empty, -float("inf"), (peak + gl.log2(weight)) * LN2)
    sum_of_row = gl.convert_layout(gl.sum(acc, 1), rows)
    lse = gl.where(sum_of_row - sum_of_row == 0, lse, float("nan"))
    batch, q_start, first, k_start, k_len = span
    i, head, slot, ok = rows_of_tile(r0 + gl.arange(0, R, layout=rows), h, t, span, G, GP, M)
    gl.store(p_lse + (batch * (H if GP == 1 else H * G) + head) * q_slots + slot, lse, mask=ok)
    spoilt = (ok & (lse != lse)).to(gl.int32)
    i, head, slot, ok = rows_of_tile(r0 + gl.arange(0, R, layout=gl.SliceLayout(1, wide)), h, t, span, G, GP, M)
    p_out = head_base(out, batch, head) + slot * out.s_row
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    gl.store(p_out[:, None] + o_d[None, :], gl.convert_layout(acc.to(out.p.dtype.element_ty), wide), mask=ok[:, None])
    return spoilt


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    computed,
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
    """Attention of rows [64 WHICH, 64 WHICH + 64) of every tile."""
    q, out, p_lse, spoilt, bias, places, mask, singles, marks, scale, q_slots, tiles, total, room, barriers = computed
    q_tile, k_tiles, v_tiles, b_tiles, k_tail, v_tail, b_tail = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty = barriers
    R: gl.constexpr = 64
    DTYPE: gl.constexpr = q.p.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    tail_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    nothing = gl.zeros([R, N], gl.float32, scores)
    of_words: gl.constexpr = parts_of(nothing).type.layout
    of_tail_words: gl.constexpr = parts_of(gl.zeros([R, TAIL], gl.float32, tail_scores)).type.layout
    scale2 = scale * LOG2E
    has_spoilt = gl.zeros([R], gl.int32, rows)
    n_tiles, n_tails, stage, phase = 0, 0, 0, 0
    next_list = list_of(singles, places, mask, gl.program_id(0), tiles, total, H, OWN_MASKS, M)
    for x in range(gl.program_id(0), total, gl.num_programs(0)):
        h, t, o_list, there, span = tile_of(places, mask, x, tiles, H, OWN_MASKS, M)
        start, count, n_whole = next_list
        n_whole = n_whole // N
        next_list = list_of(singles, places, mask, x + gl.num_programs(0), tiles, total, H, OWN_MASKS, M)
        if there:
            n_chunks, has_tail = chunks_of(count, N, TAIL)
            row = (WHICH * R + gl.arange(0, R, layout=rows)) % M
            words = words_of(marks, o_list, 0, n_whole, count, row, of_words, M, N, N)
            tail_words = words_of(marks, o_list, n_chunks, n_whole, count, row, of_tail_words, M, N, TAIL)
            mbarrier.wait(q_full, n_tiles & 1)
            n_tiles += 1
            mine = q_tile.slice(WHICH * R, R).load(gl.DotOperandLayout(0, scores, 2))
            async_copy.mbarrier_arrive(q_empty, increment_count=False)
            mbarrier.wait(k_full.index(stage), phase)
            fence_async_shared()
            s = warpgroup_mma(mine, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if bias is not None:
                s += b_tiles.index(stage).load(columns)[None, :]
            async_copy.mbarrier_arrive(k_empty.index(stage), increment_count=False)
            if n_whole < 1:
                s = masked(s, words)
            s_tail = gl.full([R, TAIL], -float("inf"), gl.float32, tail_scores)
            if has_tail:
                mbarrier.wait(tail_full, n_tails & 1)
                fence_async_shared()
                mine_too = gl.convert_layout(mine, gl.DotOperandLayout(0, tail_scores, 2))
                s_tail = warpgroup_mma(mine_too, k_tail.permute((1, 0)), s_tail, use_acc=False, is_async=True)
                s_tail = warpgroup_mma_wait(0, deps=[s_tail])
                if bias is not None:
                    s_tail += b_tail.load(gl.SliceLayout(0, tail_scores))[None, :]
                s_tail = masked(s_tail, tail_words)
            peak = gl.maximum(peaks_of(s, rows), peaks_of(s_tail, rows)) * scale2
            base = base_of(peak)
            weights, tail_weights = weights_of(s, base, scale2), weights_of(s_tail, base, scale2)
            parts = parts_of(weights) + gl.convert_layout(parts_of(tail_weights), of_words)
            acc = gl.zeros([R, D], gl.float32, sums)
            if has_tail:
                acc = warpgroup_mma(gl.convert_layout(tail_weights.to(DTYPE), left), v_tail, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                async_copy.mbarrier_arrive(tail_empty, increment_count=False)
                n_tails += 1
            half = gl.convert_layout(weights.to(DTYPE), left)
            for y in range(1, n_chunks):
                ahead, phase_ahead = next_stage(stage, phase, STAGES)
                words = words_of(marks, o_list, y, n_whole, count, row, of_words, M, N, N)
                mbarrier.wait(k_full.index(ahead), phase_ahead)
                mbarrier.wait(v_full.index(stage), phase)
                fence_async_shared()
                s = warpgroup_mma(mine, k_tiles.index(ahead).permute((1, 0)), nothing, use_acc=False, is_async=True)
                acc = warpgroup_mma(half, v_tiles.index(stage), acc, is_async=True)
                if bias is not None:
                    b = b_tiles.index(ahead).load(columns)
                s = warpgroup_mma_wait(1, deps=[s])
                if bias is not None:
                    s += b[None, :]
                if y >= n_whole:
                    s = masked(s, words)
                new_peak = gl.maximum(peak, peaks_of(s, rows) * scale2)
                base = base_of(new_peak)
                weights, fade = weights_of(s, base, scale2), gl.exp2(peak - base)
                peak = new_peak
                parts = parts * gl.convert_layout(fade, gl.SliceLayout(1, of_words))[:, None] + parts_of(weights)
                # Without a branch the assembler would move the wait to before the exponentials.
                if mask.n > 0:
                    async_copy.mbarrier_arrive(k_empty.index(ahead), increment_count=False)
                next_half = gl.convert_layout(weights.to(DTYPE), left)
                acc, half = warpgroup_mma_wait(0, deps=[acc, next_half])
                async_copy.mbarrier_arrive(v_empty.index(stage), increment_count=False)
                acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, sums))[:, None]
                stage, phase = ahead, phase_ahead
            mbarrier.wait(v_full.index(stage), phase)
            fence_async_shared()
            acc = warpgroup_mma(half, v_tiles.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            async_copy.mbarrier_arrive(v_empty.index(stage), increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)

            weight = gl.convert_layout(gl.sum(parts, 1), rows)
            spoilt_rows = _store(out, p_lse, acc, weight, peak, WHICH * R, h, t, span, q_slots, H, G, GP, M)
            has_spoilt = gl.maximum(has_spoilt, spoilt_rows)
    gl.store(spoilt + 2 * gl.program_id(0) + WHICH, gl.max(has_spoilt, 0))


@gluon.jit
def forward_hopper(
    q,
    k,
    v,
    bias,
    out,
    p_lse,
    spoilt,
    places,
    mask,
    singles,
    marks,
    scale,
    q_slots,
    tiles,
    total,
    H: gl.constexpr,
    OWN_MASKS: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    TAIL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """`forward.forward_kernel` for lists that serve every pair; tiles: query tiles of a sequence, total: of all.

    spoilt [programs, 2]: whether there are rows with an LSE of NaN.
    """
    DTYPE: gl.constexpr = q.p.dtype.element_ty
    R: gl.constexpr = M * GP
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    q_tile = gl.allocate_shared_memory(DTYPE, [R, D], gl.NVMMASharedLayout.get_default_for([R, D], DTYPE))
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], tile)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], tile)
    few: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TAIL, D], DTYPE)
    k_tail = gl.allocate_shared_memory(DTYPE, [TAIL, D], few)
    v_tail = gl.allocate_shared_memory(DTYPE, [TAIL, D], few)
    b_tiles, b_tail = k_tiles, k_tail
    if bias is not None:
        b_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        b_tail = gl.allocate_shared_memory(gl.float32, [TAIL], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    tail_full = gl.allocate_shared_memory(gl.int64, [1], one)
    tail_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    # Every thread arrives, when its copies have. Consumers copy nothing, but that spares them a barrier among themselves.
    mbarrier.init(q_full, count=128)
    mbarrier.init(q_empty, count=256)
    mbarrier.init(tail_full, count=128)
    mbarrier.init(tail_empty, count=256)
    for x in gl.static_range(STAGES):
        mbarrier.init(k_full.index(x), count=128)
        mbarrier.init(k_empty.index(x), count=256)
        mbarrier.init(v_full.index(x), count=128)
        mbarrier.init(v_empty.index(x), count=256)
    room = (q_tile, k_tiles, v_tiles, b_tiles, k_tail, v_tail, b_tail)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty)
    copied = (q, k, v, bias, places, mask, singles, tiles, total, room, barriers)
    computed = (q, out, p_lse, spoilt, bias, places, mask, singles, marks, scale, q_slots, tiles, total, room, barriers)
    gl.warp_specialize(
        [
            (_consume, (0, computed, H, OWN_MASKS, G, GP, M, N, D, STAGES, TAIL)),
            (_consume, (1, computed, H, OWN_MASKS, G, GP, M, N, D, STAGES, TAIL)),
            (produce, (copied, H, OWN_MASKS, G, GP, M, N, D, STAGES, TAIL)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
