"""The predicate of a layout in FA4's kernel language, for tiles that are kept in part.

Rows and slots are counted from the first slot of K as the kernel gets it. The first vector, int64 [Hq, slots], says which rows a
slot serves: the first one in its lower half, how many in its upper half. Less is computed for each score than with a first and a
last row in two vectors: one load serves both, and a difference that is compared without a sign is below 0 and too large at once.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import cutlass
from cutlass import cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def keep_by_rows(batch, head, query, key, sizes, vectors):
    """first <= i < first + number."""
    rows = vectors[0][head[0], key[0]]
    since = query[0] + sizes.seqlen_k - sizes.seqlen_q - cutlass.Int32(rows)
    number = scalar_to_ssa(cutlass.Uint32(rows >> 32), cutlass.Uint32)
    return scalar_to_ssa(cutlass.Uint32(since), cutlass.Uint32) < number


@cute.jit
def keep_by_rows_or_offset(batch, head, query, key, sizes, vectors):
    """j <= i and (i < j + number or offset[head, i - j]), the first row being j; `vectors` holds offset, int32 [Hq, keys], too."""
    rows = vectors[0][head[0], key[0]]
    since = query[0] + sizes.seqlen_k - sizes.seqlen_q - cutlass.Int32(rows)
    number = scalar_to_ssa(cutlass.Uint32(rows >> 32), cutlass.Uint32)
    near = scalar_to_ssa(cutlass.Uint32(since), cutlass.Uint32) < number
    zero = scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)
    offset = scalar_to_ssa(vectors[1][head[0], cutlass.max(since, cutlass.Int32(0))], cutlass.Int32)
    return near | ((scalar_to_ssa(since, cutlass.Int32) >= zero) & (offset > zero))
