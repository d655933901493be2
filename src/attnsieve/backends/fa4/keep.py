"""The predicate of a layout in FA4's kernel language, for tiles that are kept in part."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import cutlass
from cutlass import cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def keep_by_end(batch, head, query, key, sizes, vectors):
    """j <= i < end[head, j]; `vectors` holds end, int32 [Hq, keys]."""
    i = query + scalar_to_ssa(sizes.seqlen_k - sizes.seqlen_q, cutlass.Int32)
    end = scalar_to_ssa(vectors[0][head[0], key[0]], cutlass.Int32)
    return (key <= i) & (i < end)


@cute.jit
def keep_by_end_or_offset(batch, head, query, key, sizes, vectors):
    """j <= i and (i < end[head, j] or offset[head, i - j]); `vectors` holds end and offset, int32 [Hq, keys] each."""
    i = query + scalar_to_ssa(sizes.seqlen_k - sizes.seqlen_q, cutlass.Int32)
    end = scalar_to_ssa(vectors[0][head[0], key[0]], cutlass.Int32)
    distance = cutlass.max(i[0] - key[0], cutlass.Int32(0))
    offset = scalar_to_ssa(vectors[1][head[0], distance], cutlass.Int32)
    return (key <= i) & ((i < end) | (offset > scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)))


@cute.jit
def keep_by_bound(batch, head, query, key, sizes, vectors):
    """Rows and slots are counted from the first slot in front of K. bound = vectors[0][head, key], int32 [Hq, slots], is ~start of
    slots in front, which are kept if start <= i, and of others their end: kept if j <= i < end."""
    i = query + scalar_to_ssa(sizes.seqlen_k - sizes.seqlen_q, cutlass.Int32)
    bound = scalar_to_ssa(vectors[0][head[0], key[0]], cutlass.Int32)
    zero, one = scalar_to_ssa(cutlass.Int32(0), cutlass.Int32), scalar_to_ssa(cutlass.Int32(1), cutlass.Int32)
    in_front = (bound < zero) & (i + bound + one >= zero)
    return in_front | ((key <= i) & (i < bound))
