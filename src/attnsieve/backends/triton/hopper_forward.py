"""Prefill by lists of single keys on Hopper GPUs, in Gluon: some warps copy, others compute.

The kernel computes what `forward.forward_kernel` does, for lists that serve every pair. Triton's warps copy and compute in turn, and
every tile of queries begins with a chain of loads that nothing hides. Here one program per multiprocessor goes through many tiles.
A group of four warps, the producer, copies Q, K and V into shared memory, as far ahead as there is room for; two groups, the
consumers, each own 64 of a tile's 128 rows. They hand over by barriers in shared memory: `full` when a stage was copied, `empty` when
both consumers have read it. The order of a consumer's steps lets the matrix unit work while it computes exponentials.

Rows whose sums are not finite get an LSE of NaN, by which `forward_kernel` finds the tiles to compute again (see `nonfinite`).
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

from attnsieve.backends.triton import hopper
from attnsieve.backends.triton.common import LN2 as _LN2
from attnsieve.backends.triton.common import LOG2E as _LOG2E
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.hopper_copies import list_of, next_stage, produce, rows_of_tile, tile_of
from attnsieve.backends.triton.hopper_softmax import masked, parts_of, weigh, words_of
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.schedule import Schedule

LOG2E, LN2 = gl.constexpr(_LOG2E.value), gl.constexpr(_LN2.value)

# Four stages of keys and values, and one tile of queries, fill most of a multiprocessor's shared memory. Registers are those of a
# consumer's thread; the producer's get what is left of 504 for three.
TILES = Tiles(rows=128, keys=64, warps=4, stages=4, registers=208)


def prefill(geometry: Geometry, built: Schedule) -> Launch:
    """What launches the kernel for calls like the geometry's, whose tiles are TILES but for how they are spread over warps."""
    call, constants = geometry.call, geometry.constants()
    total = geometry.query_tiles * call.layout.heads * len(call.spans)
    return Launch(
        forward_hopper,
        (min(total, hopper.multiprocessors(call.q.device)), 1, 1),
        built.mask,
        built.singles,
        built.marks,
        call.scale,
        call.q.shape[2],
        geometry.query_tiles,
        total,
        **{name: constants[name] for name in ("H", "OWN_MASKS", "G", "GP", "M", "N", "D")},
        STAGES=TILES.stages,
        REGISTERS=TILES.registers,
        num_warps=TILES.warps,
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
    """Store outputs and LSE of the rows from r0 on of a tile: sums acc [R, D] and weight [R] relative to peak [R]."""
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
    head, slot, ok = rows_of_tile(h, t, span, r0 + gl.arange(0, R, layout=rows), G, GP, M)
    gl.store(p_lse + (batch * (H if GP == 1 else H * G) + head) * q_slots + slot, lse, mask=ok)
    head, slot, ok = rows_of_tile(h, t, span, r0 + gl.arange(0, R, layout=gl.SliceLayout(1, wide)), G, GP, M)
    p_out = out.p + batch * out.s_batch + head.to(gl.int64) * out.s_head + slot * out.s_row
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    gl.store(p_out[:, None] + o_d[None, :], gl.convert_layout(acc.to(out.p.dtype.element_ty), wide), mask=ok[:, None])


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
):
    """Attention of rows [64 WHICH, 64 WHICH + 64) of every tile."""
    q, out, p_lse, bias, places, mask, singles, marks, scale, q_slots, tiles, total, room, barriers = computed
    q_tile, k_tiles, v_tiles, b_tiles = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    R: gl.constexpr = 64
    DTYPE: gl.constexpr = q.p.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    mine = q_tile.slice(WHICH * R, R)
    nothing = gl.zeros([R, N], gl.float32, scores)
    of_words: gl.constexpr = parts_of(nothing).type.layout
    scale2 = scale * LOG2E
    n_tiles, stage, phase = 0, 0, 0
    next_list = list_of(singles, places, mask, gl.program_id(0), tiles, total, H, OWN_MASKS, M)
    for x in range(gl.program_id(0), total, gl.num_programs(0)):
        h, t, o_list, there, span = tile_of(places, mask, x, tiles, H, OWN_MASKS, M)
        start, count, n_whole = next_list
        n_whole = n_whole // N
        next_list = list_of(singles, places, mask, x + gl.num_programs(0), tiles, total, H, OWN_MASKS, M)
        if there:
            row = (WHICH * R + gl.arange(0, R, layout=rows)) % M
            words = words_of(marks, o_list, 0, n_whole, count, row, of_words, M, N)
            mbarrier.wait(q_full, n_tiles & 1)
            n_tiles += 1
            mbarrier.wait(k_full.index(stage), phase)
            fence_async_shared()
            s = warpgroup_mma(mine, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if bias is not None:
                s += b_tiles.index(stage).load(columns)[None, :]
            async_copy.mbarrier_arrive(k_empty.index(stage), increment_count=False)
            if n_whole < 1:
                s = masked(s, words)
            weights, fade, peak = weigh(s, gl.full([R], -float("inf"), gl.float32, rows), scale2, rows)
            parts = parts_of(weights)
            acc = gl.zeros([R, D], gl.float32, sums)
            half = gl.convert_layout(weights.to(DTYPE), left)
            for y in range(1, gl.cdiv(count, N)):
                ahead, phase_ahead = next_stage(stage, phase, STAGES)
                words = words_of(marks, o_list, y, n_whole, count, row, of_words, M, N)
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
                weights, fade, peak = weigh(s, peak, scale2, rows)
                faded = gl.convert_layout(fade, gl.SliceLayout(1, parts.type.layout))
                parts = parts * faded[:, None] + parts_of(weights)
                # Without a branch the assembler would move the wait to before the exponentials.
                if mask.n > 0:
                    async_copy.mbarrier_arrive(k_empty.index(ahead), increment_count=False)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                async_copy.mbarrier_arrive(v_empty.index(stage), increment_count=False)
                acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, sums))[:, None]
                half = gl.convert_layout(weights.to(DTYPE), left)
                stage, phase = ahead, phase_ahead
            async_copy.mbarrier_arrive(q_empty, increment_count=False)
            mbarrier.wait(v_full.index(stage), phase)
            fence_async_shared()
            acc = warpgroup_mma(half, v_tiles.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            async_copy.mbarrier_arrive(v_empty.index(stage), increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)

            weight = gl.convert_layout(gl.sum(parts, 1), rows)
            _store(out, p_lse, acc, weight, peak, WHICH * R, h, t, span, q_slots, H, G, GP, M)


@gluon.jit
def forward_hopper(
    q,
    k,
    v,
    bias,
    out,
    p_lse,
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
    REGISTERS: gl.constexpr,
):
    """`forward.forward_kernel` for lists that serve every pair; tiles: query tiles of a sequence, total: of all."""
    DTYPE: gl.constexpr = q.p.dtype.element_ty
    R: gl.constexpr = M * GP
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], DTYPE)
    q_tile = gl.allocate_shared_memory(DTYPE, [R, D], gl.NVMMASharedLayout.get_default_for([R, D], DTYPE))
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], tile)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], tile)
    b_tiles = k_tiles
    if bias is not None:
        b_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    # Every thread arrives, when its copies have. Consumers copy nothing, but that spares them a barrier among themselves.
    mbarrier.init(q_full, count=128)
    mbarrier.init(q_empty, count=256)
    for x in gl.static_range(STAGES):
        mbarrier.init(k_full.index(x), count=128)
        mbarrier.init(k_empty.index(x), count=256)
        mbarrier.init(v_full.index(x), count=128)
        mbarrier.init(v_empty.index(x), count=256)
    room = (q_tile, k_tiles, v_tiles, b_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    copied = (q, k, v, bias, places, mask, singles, tiles, total, room, barriers)
    computed = (q, out, p_lse, bias, places, mask, singles, marks, scale, q_slots, tiles, total, room, barriers)
    gl.warp_specialize(
        [
            (_consume, (0, computed, H, OWN_MASKS, G, GP, M, N, D, STAGES)),
            (_consume, (1, computed, H, OWN_MASKS, G, GP, M, N, D, STAGES)),
            (produce, (copied, H, OWN_MASKS, G, GP, M, N, D, STAGES)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
