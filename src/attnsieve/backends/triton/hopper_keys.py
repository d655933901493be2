"""dK, dV and the gradient of the key bias of listed keys on Hopper GPUs, in Gluon: Triton's language of explicit layouts and waits.

The kernel computes what `backward_keys.dkv_singles_kernel` does, for lists that serve every pair. Triton waits for each product of the
matrix unit before it goes on. Here both products of scores are queued at once, and the unit works on one product while the
exponentials or differences of another are computed. dQ gains nothing by that (docs/LOG.md).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from attnsieve.backends.triton.common import LOG2E as _LOG2E
from attnsieve.backends.triton.common import head_base, span_of
from attnsieve.backends.triton.geometry import Tiles
from attnsieve.backends.triton.product_columns import DELTA_COLUMN as _DELTA
from attnsieve.backends.triton.product_columns import LSE_COLUMN as _LSE
from attnsieve.backends.triton.product_columns import at_most_0

LOG2E = gl.constexpr(_LOG2E.value)
LSE_COLUMN = gl.constexpr(_LSE.value)
DELTA_COLUMN = gl.constexpr(_DELTA.value)
# The same functions, compiled as Gluon.
_span_of, _base, _at_most_0 = gluon.jit(span_of.fn), gluon.jit(head_base.fn), gluon.jit(at_most_0.fn)

# 128 keys a program halve what is read of Q and dO; they take all registers of a multiprocessor.
TILES = Tiles(rows=64, keys=128, warps=8, stages=3)
STRETCH_ROWS = 1024


@gluon.jit
def _copy_rows(tile, p_base, slots, s_row, ok, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Queue the copy of rows `slots` [R] of a [slots, WIDTH] tensor into shared memory, zeros where not ok."""
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    p_x = (p_base + slots.to(gl.int64) * s_row)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(tile, p_x, mask=ok[:, None])


@gluon.jit
def _rows(y, head0, q_start, first, stop, R: gl.constexpr, M: gl.constexpr, G: gl.constexpr, layout: gl.constexpr):
    """Head and slot [R] of the rows of positions [y, y + M), and whether they are rows of queries before `stop`."""
    r = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    i = y + r % M
    return head0 + r // M, q_start + i - first, (i >= first) & (i < stop) & (r // M < G)


@gluon.jit
def _copy_queries(
    q,
    d_out,
    columns,
    tiles,
    stage,
    y,
    place,
    G: gl.constexpr,
    M: gl.constexpr,
    D: gl.constexpr,
    wide: gl.constexpr,
    narrow: gl.constexpr,
):
    """Queue the copies of the rows of positions [y, y + M): Q, dO and their columns. place: batch, and arguments of `_rows`."""
    q_tiles, d_tiles, c_tiles = tiles
    batch, head0, q_start, first, stop = place
    R: gl.constexpr = q_tiles.shape[1]
    head, slot, ok = _rows(y, head0, q_start, first, stop, R, M, G, wide)
    _copy_rows(q_tiles.index(stage), _base(q, batch, head), slot, q.s_row, ok, D, wide)
    _copy_rows(d_tiles.index(stage), _base(d_out, batch, head), slot, d_out.s_row, ok, D, wide)
    head, slot, ok = _rows(y, head0, q_start, first, stop, R, M, G, narrow)
    _copy_rows(c_tiles.index(stage), _base(columns, batch, head), slot, columns.s_row, ok, 16, narrow)
    async_copy.commit_group()


@gluon.jit
def _listed(p_list, chunk, count, k_len, N: gl.constexpr, layout: gl.constexpr):
    """The keys [N] of a chunk of a list, and which of them are keys."""
    o_x = chunk * N + gl.arange(0, N, layout=layout)
    j = gl.load(p_list + o_x, mask=o_x < count, other=0)
    return j, (o_x < count) & (j < k_len)


@gluon.jit
def _indicator(FIRST: gl.constexpr, SIZE: gl.constexpr, DTYPE: gl.constexpr, layout: gl.constexpr):
    """`product_columns.indicator`."""
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))
    row = gl.where((column >= FIRST) & (column < FIRST + 3), 1.0, 0.0)
    return (gl.zeros([SIZE, 16], gl.float32, layout) + row[None, :]).to(DTYPE)


@gluon.jit
def dkv_hopper(
    q,
    k,
    v,
    bias,
    d_out,
    columns,
    d_k,
    d_v,
    p_db,
    places,
    mask,
    singles,
    scale,
    k_slots,
    ROWS: gl.constexpr,
    H: gl.constexpr,
    OWN_MASKS: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sums of N listed keys over a stretch of ROWS positions; programs: (chunk of the list, stretch x layout head, sequence)."""
    chunk, h, i_s = gl.program_id(0), gl.program_id(1) % H, gl.program_id(2)
    batch, q_start, first, k_start, k_len = _span_of(places, i_s)
    stretch = gl.cdiv(k_len, ROWS) - 1 - gl.program_id(1) // H
    if (stretch + 1) * ROWS <= first or stretch < 0:
        return
    o_zh = (i_s.to(gl.int64) if OWN_MASKS else i_s.to(gl.int64) * 0) * H + h
    o_list = o_zh * gl.cdiv(mask.n, ROWS) + stretch
    count = gl.load(singles.count + o_list)
    if chunk * N >= count:
        return
    R: gl.constexpr = M * GP
    DTYPE: gl.constexpr = q.p.dtype.element_ty
    COLUMNS: gl.constexpr = columns.p.dtype.element_ty
    # How registers hold rows on their way from and to memory, scores [N, R], and sums [N, D] with their left factors.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [WARPS, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], DTYPE)
    few: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, 16], COLUMNS)

    head0 = h if GP == 1 else h * G
    kv_head = h // G if GP == 1 else h
    p_list = singles.items + gl.load(singles.start + o_list)
    y0 = gl.maximum(stretch * ROWS, first // M * M)
    y1 = gl.minimum(stretch * ROWS + ROWS, k_len)
    place = (batch, head0, q_start, first, y1)

    k_tile = gl.allocate_shared_memory(DTYPE, [N, D], tile)
    v_tile = gl.allocate_shared_memory(DTYPE, [N, D], tile)
    ones = gl.allocate_shared_memory(COLUMNS, [N, 16], few, _indicator(DELTA_COLUMN, N, COLUMNS, narrow))
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, R, D], tile)
    d_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, R, D], tile)
    c_tiles = gl.allocate_shared_memory(COLUMNS, [STAGES, R, 16], few)
    tiles = (q_tiles, d_tiles, c_tiles)
    j, ok = _listed(p_list, chunk, count, k_len, N, gl.SliceLayout(1, wide))
    _copy_rows(k_tile, _base(k, batch, kv_head) + k_start * k.s_row, j, k.s_row, ok, D, wide)
    _copy_rows(v_tile, _base(v, batch, kv_head) + k_start * v.s_row, j, v.s_row, ok, D, wide)
    if bias is None:
        b_tile = gl.allocate_shared_memory(COLUMNS, [N, 16], few, _indicator(LSE_COLUMN, N, COLUMNS, narrow))
    else:
        b_tile = gl.allocate_shared_memory(COLUMNS, [N, 16], few)
        j, ok = _listed(p_list, chunk, count, k_len, N, gl.SliceLayout(1, narrow))
        _copy_rows(b_tile, _base(bias, batch, kv_head) + k_start * bias.s_row, j, bias.s_row, ok, 16, narrow)
    for x in gl.static_range(STAGES - 1):
        _copy_queries(q, d_out, columns, tiles, x, y0 + x * M, place, G, M, D, wide, narrow)
    fence_async_shared()

    j, ok = _listed(p_list, chunk, count, k_len, N, gl.SliceLayout(1, scores))
    end = gl.load(mask.ends + o_zh * mask.n + j, mask=ok, other=0)
    whole = (chunk + 1) * N <= gl.load(singles.whole + o_list)
    row = gl.arange(0, R, layout=gl.SliceLayout(0, scores)) % M
    nothing = gl.zeros([N, R], gl.float32, scores)
    dk = warpgroup_mma_init(gl.zeros([N, D], gl.float32, sums))
    dv = warpgroup_mma_init(gl.zeros([N, D], gl.float32, sums))
    d_bias = gl.zeros([N], gl.float32, gl.SliceLayout(1, scores))
    scale2 = scale * LOG2E
    stage = 0
    for y in range(y0, y1, M):
        q_tile, d_tile, c_tile = q_tiles.index(stage), d_tiles.index(stage), c_tiles.index(stage)
        # Triton puts a barrier behind every wait for copies.
        async_copy.wait_group(STAGES - 2)
        s = warpgroup_mma(b_tile, c_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s, is_async=True)
        dp = warpgroup_mma(ones, c_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(v_tile, d_tile.permute((1, 0)), dp, is_async=True)
        # Of the six products in flight these are the last four: when all warps are here, the rows of the step before are free.
        dk, dv = warpgroup_mma_wait(4, deps=[dk, dv])
        gl.thread_barrier()
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        _copy_queries(q, d_out, columns, tiles, free, y + (STAGES - 1) * M, place, G, M, D, wide, narrow)
        s = warpgroup_mma_wait(2, deps=[s])
        if not whole:
            i = y + row
            s = gl.where((j[:, None] <= i[None, :]) & (i[None, :] < end[:, None]), s, -float("inf"))
        weights = gl.exp2(s * scale2 if bias is None else _at_most_0(s * scale2))
        dv = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), left), d_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = weights * dp
        d_bias += gl.sum(ds, 1)
        dk = warpgroup_mma(gl.convert_layout(ds.to(DTYPE), left), q_tile, dk, is_async=True)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    # The last copies hold no rows, but they write where the sums now are on their way to memory.
    async_copy.wait_group(0)

    if p_db is not None:
        p_bias = p_db + (batch * (H if GP > 1 else H // G) + kv_head) * k_slots + k_start + j
        gl.atomic_add(p_bias, d_bias, mask=ok, sem="relaxed")
    j, ok = _listed(p_list, chunk, count, k_len, N, gl.SliceLayout(1, flat))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, flat))
    p_dk = (_base(d_k, batch, kv_head) + (k_start + j) * d_k.s_row)[:, None] + o_d[None, :]
    p_dv = (_base(d_v, batch, kv_head) + (k_start + j) * d_v.s_row)[:, None] + o_d[None, :]
    gl.atomic_add(p_dk, gl.convert_layout(dk * scale, flat), mask=ok[:, None], sem="relaxed")
    gl.atomic_add(p_dv, gl.convert_layout(dv, flat), mask=ok[:, None], sem="relaxed")
