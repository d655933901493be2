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
from attnsieve.backends.triton.bits import in_runs
from attnsieve.backends.triton.common import LN2 as _LN2
from attnsieve.backends.triton.common import LOG2E as _LOG2E
from attnsieve.backends.triton.common import head_base, span_of
from attnsieve.backends.triton.geometry import Geometry, Tiles
from attnsieve.backends.triton.launch import Launch
from attnsieve.backends.triton.schedule import Schedule

LOG2E, LN2 = gl.constexpr(_LOG2E.value), gl.constexpr(_LN2.value)
# The same functions, compiled as Gluon.
_span_of, _base, _in_runs = gluon.jit(span_of.fn), gluon.jit(head_base.fn), gluon.jit(in_runs.fn)

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
def _tile(places, mask, x, tiles, H: gl.constexpr, OWN_MASKS: gl.constexpr, M: gl.constexpr):
    """Of tile x of all: layout head, query tile, its list, whether it has queries, and its span. The longest lists come first."""
    h, i_s = x % H, x // H // tiles
    batch, q_start, first, k_start, k_len = _span_of(places, i_s)
    t = gl.cdiv(k_len, M) - 1 - x // H % tiles
    o_list = ((i_s.to(gl.int64) if OWN_MASKS else i_s.to(gl.int64) * 0) * H + h) * mask.tiles + gl.maximum(t, 0)
    return h, t, o_list, (t >= 0) & ((t + 1) * M > first), (batch, q_start, first, k_start, k_len)


@gluon.jit
def _list(singles, places, mask, x, tiles, total, H: gl.constexpr, OWN_MASKS: gl.constexpr, M: gl.constexpr):
    """Start, length and number of whole keys of the list of tile x, of which nothing is used if there is no such tile."""
    h, t, o_list, there, span = _tile(places, mask, gl.minimum(x, total - 1), tiles, H, OWN_MASKS, M)
    return gl.load(singles.start + o_list), gl.load(singles.count + o_list), gl.load(singles.whole + o_list)


@gluon.jit
def _rows(h, t, span, r, G: gl.constexpr, GP: gl.constexpr, M: gl.constexpr):
    """Head and slot of the rows r of a tile, and whether they are rows of queries."""
    batch, q_start, first, k_start, k_len = span
    i = t * M + r % M
    head = (h if GP == 1 else h * G) + r // M
    return head, q_start + i - first, (i >= first) & (i < k_len) & (r // M < G)


@gluon.jit
def _copy_keys(tile, p_base, j, s_row, D: gl.constexpr, wide: gl.constexpr):
    """Queue the copies of rows j of K or V. The addresses of a row are added up in 64 bits of one multiplication in 32."""
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    o_row = j.to(gl.uint32).to(gl.int64) * s_row.to(gl.uint32).to(gl.int64)
    async_copy.async_copy_global_to_shared(tile, (p_base + o_row)[:, None] + o_d[None, :])


@gluon.jit
def _produce(
    copied,
    H: gl.constexpr,
    OWN_MASKS: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy every tile's rows of Q, then chunk by chunk the keys of its list, in the order of `in_runs`, with bias and values."""
    q, k, v, bias, places, mask, singles, tiles, total, room, barriers = copied
    q_tile, k_tiles, v_tiles, b_tiles = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_n = _in_runs(gl.arange(0, N, layout=gl.SliceLayout(1, wide)), N)
    o_f = _in_runs(gl.arange(0, N, layout=flat), N)
    r = gl.arange(0, M * GP, layout=gl.SliceLayout(1, wide))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    n_tiles, stage, phase = 0, 0, 1
    ahead = _list(singles, places, mask, gl.program_id(0), tiles, total, H, OWN_MASKS, M)
    for x in range(gl.program_id(0), total, gl.num_programs(0)):
        h, t, o_list, there, span = _tile(places, mask, x, tiles, H, OWN_MASKS, M)
        start, count, n_whole = ahead
        ahead = _list(singles, places, mask, x + gl.num_programs(0), tiles, total, H, OWN_MASKS, M)
        if there:
            batch, q_start, first, k_start, k_len = span
            p_list = singles.items + start
            j, few = gl.load(p_list + o_n), gl.load(p_list + o_f)
            head, slot, ok = _rows(h, t, span, r, G, GP, M)
            p_q = q.p + batch * q.s_batch + head.to(gl.int64) * q.s_head + slot * q.s_row
            mbarrier.wait(q_empty, (n_tiles & 1) ^ 1)
            async_copy.async_copy_global_to_shared(q_tile, p_q[:, None] + o_d[None, :], mask=ok[:, None])
            async_copy.mbarrier_arrive(q_full, increment_count=False)
            n_tiles += 1
            kv_head = h // G if GP == 1 else h
            p_k = _base(k, batch, kv_head) + k_start * k.s_row
            p_v = _base(v, batch, kv_head) + k_start * v.s_row
            # Consumers take one chunk also of a list without keys; beyond a list's end they read the tile's first key.
            for y in range(0, gl.maximum(gl.cdiv(count, N), 1)):
                here = gl.minimum(gl.where(y * N + o_n < count, j, t * M), k_len - 1)
                alone = gl.minimum(gl.where(y * N + o_f < count, few, t * M), k_len - 1)
                # Looked up one step ahead; lists end with spare entries.
                j, few = gl.load(p_list + (y + 1) * N + o_n), gl.load(p_list + (y + 1) * N + o_f)
                mbarrier.wait(k_empty.index(stage), phase)
                if bias is not None:
                    p_bias = _base(bias, batch, kv_head) + (k_start + alone) * bias.s_row
                    async_copy.async_copy_global_to_shared(b_tiles.index(stage), p_bias)
                _copy_keys(k_tiles.index(stage), p_k, here, k.s_row, D, wide)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), phase)
                _copy_keys(v_tiles.index(stage), p_v, here, v.s_row, D, wide)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                last = stage == STAGES - 1
                stage, phase = gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _of_quads(s):
    """[R, N] as [R, N / 8, 4, 2]: four threads hold a row, each two columns of every eight."""
    return s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])


@gluon.jit
def _words(marks, o_list, chunk, n_whole, count, row, layout: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """[R, 4] of `marks`: in the order of `in_runs` a thread's columns lie in a quarter of a row's word. 0 where there is none."""
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))
    row = gl.convert_layout(row, gl.SliceLayout(1, layout))
    p_word = marks.words + (o_list * marks.chunks + gl.maximum(chunk - n_whole, 0)) * M + row
    p_half = p_word.to(gl.pointer_type(gl.int32), bitcast=True)[:, None] + (quarter >> 1)[None, :]
    there = (chunk >= n_whole) & (chunk * N < count)
    return gl.load(p_half, mask=there, other=0) >> (quarter & 1)[None, :] * 16


@gluon.jit
def _masked(s, words):
    """Scores [R, N], -inf where the words [R, 4] do not say that a row keeps a key; compare `bits.bounds`."""
    quads = _of_quads(s)
    of_quads: gl.constexpr = quads.type.layout
    of_words: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, of_quads))
    eighth = gl.arange(0, s.shape[1] // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, of_quads))))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, of_quads))))
    bit = eighth[None, :, None, None] * 2 + half[None, None, None, :]
    words = gl.convert_layout(words, of_words)[:, None, :, None]
    sign = (~words << (31 - bit)) & -0x80000000
    kept = gl.minimum(quads, (sign | 0x7F800000).to(gl.float32, bitcast=True))
    return gl.convert_layout(kept.reshape(s.shape), s.type.layout)


@gluon.jit
def _peaks(s, rows: gl.constexpr):
    """The greatest of each row; pairs first, so that no long chain of instructions waits for each other."""
    return gl.convert_layout(gl.max(gl.max(gl.max(_of_quads(s), 3), 1), 1), rows)


@gluon.jit
def _parts(weights):
    """[R, 4]: what each thread adds to the sums of its rows. They are added up once, behind all keys."""
    return gl.sum(gl.sum(_of_quads(weights), 3), 1)


@gluon.jit
def _weigh(s, peak, scale2, rows: gl.constexpr):
    """Of the online softmax in base 2: weights [R, N], the factor [R] by which earlier sums fade, and the peak [R]."""
    new_peak = gl.maximum(peak, _peaks(s, rows) * scale2)
    base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    return gl.exp2(s * scale2 - base[:, None]), gl.exp2(peak - base), new_peak


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
    head, slot, ok = _rows(h, t, span, r0 + gl.arange(0, R, layout=rows), G, GP, M)
    gl.store(p_lse + (batch * (H if GP == 1 else H * G) + head) * q_slots + slot, lse, mask=ok)
    head, slot, ok = _rows(h, t, span, r0 + gl.arange(0, R, layout=gl.SliceLayout(1, wide)), G, GP, M)
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
    of_words: gl.constexpr = _parts(nothing).type.layout
    scale2 = scale * LOG2E
    n_tiles, stage, phase = 0, 0, 0
    next_list = _list(singles, places, mask, gl.program_id(0), tiles, total, H, OWN_MASKS, M)
    for x in range(gl.program_id(0), total, gl.num_programs(0)):
        h, t, o_list, there, span = _tile(places, mask, x, tiles, H, OWN_MASKS, M)
        start, count, n_whole = next_list
        n_whole = n_whole // N
        next_list = _list(singles, places, mask, x + gl.num_programs(0), tiles, total, H, OWN_MASKS, M)
        if there:
            row = (WHICH * R + gl.arange(0, R, layout=rows)) % M
            words = _words(marks, o_list, 0, n_whole, count, row, of_words, M, N)
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
                s = _masked(s, words)
            weights, fade, peak = _weigh(s, gl.full([R], -float("inf"), gl.float32, rows), scale2, rows)
            parts = _parts(weights)
            acc = gl.zeros([R, D], gl.float32, sums)
            half = gl.convert_layout(weights.to(DTYPE), left)
            for y in range(1, gl.cdiv(count, N)):
                last = stage == STAGES - 1
                ahead, phase_ahead = gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)
                words = _words(marks, o_list, y, n_whole, count, row, of_words, M, N)
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
                    s = _masked(s, words)
                weights, fade, peak = _weigh(s, peak, scale2, rows)
                faded = gl.convert_layout(fade, gl.SliceLayout(1, parts.type.layout))
                parts = parts * faded[:, None] + _parts(weights)
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
            last = stage == STAGES - 1
            stage, phase = gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)

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
            (_produce, (copied, H, OWN_MASKS, G, GP, M, N, D, STAGES)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
