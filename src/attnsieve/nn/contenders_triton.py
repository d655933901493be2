"""Which keys compete: the others are worse than a whole budget of keys before them, so that the row of such a key drops the key itself.

Random scores leave a budget times the logarithm of (keys / budget) or so: 8000 of 128K keys for 1024. A *bound* for the keys of a
chunk is a score that enough keys of their document before the chunk reach. Bounds are taken from a few scores that part a sample of
all keys; how many keys reach each of them is counted exactly, so that a bad sample costs time and nothing else.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from math import log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnsieve.launching import launch

# Keys that share a bound, keys of a sample, and scores that may be bounds.
CHUNK = 1024
SAMPLES = 2048
_PIVOTS = tl.constexpr(16)
# Keys for which no order is left to ask: they have gone or do not exist. NaN comes next.
GONE = tl.constexpr(2**31 - 1)
_NAN = tl.constexpr(2**31 - 2)
_WORST = tl.constexpr(-(2**31))


class Documents(NamedTuple):
    """int32 [B, n] each: see `attnsieve.nn.segments.Segments`. Both None where every row is one document without padding."""

    start: Any
    stop: Any


class Contenders(NamedTuple):
    """Keys that compete, in the order of time: int32 [R, n], the first ones of each row.

    order: their place in the order of scores, see `order_of`. slot: which keys they are; count [R]: how many; before [R, n]: how
    many come before each slot, where there are documents. All keys compete where these are None.
    """

    order: Any
    slot: Any
    count: Any
    before: Any


class Sample(NamedTuple):
    """order int32 [R, SAMPLES], best first; tail: log2 of the share of all keys that a budget is; counts int32 [R, chunks, _PIVOTS]:
    how many keys of each chunk reach each pivot."""

    order: Any
    counts: Any
    tail: Any
    size: Any


def all_contend(sigma: Tensor, documents: Documents, ends: Tensor) -> Contenders:
    """Every key of sigma [B, H, n]; and the ends of all as if none were dropped."""
    batch, heads, n = sigma.shape
    order = torch.empty(batch * heads, n, dtype=torch.int32, device=sigma.device)
    launch(_begin_kernel, (triton.cdiv(n, CHUNK), batch * heads), sigma, documents, order, ends, None, n, heads, STEP=CHUNK)
    return Contenders(order, None, None, None)


def find_contenders(sigma: Tensor, documents: Documents, ends: Tensor, budget: int, window: int, sinks: int) -> Contenders:
    """Those of sigma [B, H, n]; and the ends of all keys as if none of them were dropped."""
    batch, heads, n = sigma.shape
    rows, chunks = batch * heads, triton.cdiv(n, CHUNK)
    order, all_order, slot, before = torch.empty(4, rows, n, dtype=torch.int32, device=sigma.device).unbind()
    sample = order.new_empty(rows, SAMPLES)
    counts = order.new_empty(rows, chunks, _PIVOTS.value)
    bounds, found = order.new_empty(2, rows, chunks).unbind()
    pivots = Sample(sample, counts, log2(budget / n), SAMPLES)
    contenders = Contenders(order, slot, order.new_empty(rows), None if documents.start is None else before)
    grid = (chunks, rows)
    launch(_sample_kernel, (rows,), sigma, sample, n, SAMPLES=SAMPLES, num_warps=8)
    launch(_begin_kernel, grid, sigma, documents, all_order, ends, pivots, n, heads, STEP=CHUNK)
    launch(_bound_kernel, grid, all_order, documents, pivots, bounds, found, n, budget, heads, STEP=CHUNK)
    launch(_admit_kernel, grid, all_order, documents, bounds, found, contenders, ends, n, heads, window, sinks, STEP=CHUNK)
    return contenders


@triton.jit
def order_of(score):
    """int32 in the order of float32 scores; -0.0 equals 0.0, NaN is above every number."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


@triton.jit
def document_of(documents, n, o_row, slot, ok):
    """Start and stop of the document of a slot, in row o_row of the batch."""
    if documents.start is None:
        return slot * 0, slot * 0 + n
    else:
        start = tl.load(documents.start + o_row * n + slot, mask=ok, other=0)
        return start, tl.load(documents.stop + o_row * n + slot, mask=ok, other=0)


@triton.jit
def _sample_kernel(p_sigma, p_sample, n, SAMPLES: tl.constexpr):
    """Keys at equal distances, best first."""
    i_r, x = tl.program_id(0).to(tl.int64), tl.arange(0, SAMPLES)
    score = tl.load(p_sigma + i_r * n + x.to(tl.int64) * n // SAMPLES).to(tl.float32)
    tl.store(p_sample + i_r * SAMPLES + x, tl.sort(order_of(score), descending=True))


@triton.jit
def _pivots(sample, i_r):
    """Orders that a share of a sample reaches: from the share that the budget is to all, in equal steps of its logarithm."""
    i = tl.arange(0, _PIVOTS)
    share = tl.exp2(sample.tail * (1.0 - i / (_PIVOTS - 1.0)))
    return tl.load(sample.order + i_r * sample.size + tl.minimum((share * sample.size).to(tl.int32), sample.size - 1))


@triton.jit
def _begin_kernel(p_sigma, documents, p_order, p_ends, sample, n, heads, STEP: tl.constexpr):
    """Order of all keys, their ends if none were dropped, and how many reach each pivot of a sample."""
    i_r = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * STEP + tl.arange(0, STEP)
    ok = slot < n
    order = order_of(tl.load(p_sigma + i_r * n + slot, mask=ok, other=0.0).to(tl.float32))
    _, stop = document_of(documents, n, i_r // heads, slot, ok)
    tl.store(p_order + i_r * n + slot, order, mask=ok)
    tl.store(p_ends + i_r * n + slot, stop, mask=ok)
    if sample is not None:
        reach = ok[:, None] & (order[:, None] >= _pivots(sample, i_r)[None, :])
        o_counts = (i_r * tl.num_programs(0) + tl.program_id(0)) * _PIVOTS
        tl.store(sample.counts + o_counts + tl.arange(0, _PIVOTS), tl.sum(reach.to(tl.int32), 0))


@triton.jit
def _competes(p_order, documents, n, heads, i_r, slot, first, bound):
    """Which keys of a chunk compete: those that reach the bound of the document that comes into it, all of others; no padding.

    Also their order, and start and stop of their documents.
    """
    ok = slot < n
    order = tl.load(p_order + i_r * n + slot, mask=ok, other=0)
    start, stop = document_of(documents, n, i_r // heads, slot, ok)
    return ok & (start < stop) & ((start >= first) | (order >= bound)), order, start, stop


@triton.jit
def _bound_kernel(p_order, documents, sample, p_bounds, p_found, n, budget, heads, STEP: tl.constexpr):
    """The bound of a chunk, and how many of its keys compete."""
    i_r, c = tl.program_id(1).to(tl.int64), tl.program_id(0)
    o_row, first = i_r * tl.num_programs(0), c * STEP
    start, _ = document_of(documents, n, i_r // heads, first, True)
    # Chunks that belong to that document as a whole.
    reached = tl.zeros([_PIVOTS], tl.int32)
    i = tl.arange(0, _PIVOTS)
    for x in range(tl.cdiv(start, STEP), c, 64):
        chunk = x + tl.arange(0, 64)
        p_counts = sample.counts + (o_row + chunk)[:, None] * _PIVOTS + i[None, :]
        reached += tl.sum(tl.load(p_counts, mask=(chunk < c)[:, None], other=0), 0)
    bound = tl.max(tl.where(reached >= budget, _pivots(sample, i_r), _WORST), 0)
    competes, _, _, _ = _competes(p_order, documents, n, heads, i_r, first + tl.arange(0, STEP), first, bound)
    tl.store(p_bounds + o_row + c, bound)
    tl.store(p_found + o_row + c, tl.sum(competes.to(tl.int32), 0))


@triton.jit
def _admit_kernel(p_order, documents, p_bounds, p_found, contenders, p_ends, n, heads, window, sinks, STEP: tl.constexpr):
    """List the contenders of a chunk behind those of chunks before it; the others have the end that their own row gives them."""
    i_r, c = tl.program_id(1).to(tl.int64), tl.program_id(0)
    chunks, first = tl.num_programs(0), c * STEP
    earlier = tl.zeros([256], tl.int32)
    for x in range(0, c, 256):
        chunk = x + tl.arange(0, 256)
        earlier += tl.load(p_found + i_r * chunks + chunk, mask=chunk < c, other=0)
    n_before = tl.sum(earlier, 0)
    slot = first + tl.arange(0, STEP)
    bound = tl.load(p_bounds + i_r * chunks + c)
    competes, order, start, stop = _competes(p_order, documents, n, heads, i_r, slot, first, bound)
    rank = tl.cumsum(competes.to(tl.int32), 0)
    at = i_r * n + n_before + rank - 1
    tl.store(contenders.order + at, order, mask=competes)
    tl.store(contenders.slot + at, slot, mask=competes)
    if contenders.before is not None:
        tl.store(contenders.before + i_r * n + slot, n_before + rank - competes.to(tl.int32), mask=slot < n)
    end = tl.where(slot - start < sinks, stop, tl.minimum(slot + window, stop))
    tl.store(p_ends + i_r * n + slot, end, mask=(slot < n) & (competes == 0))
    if c == chunks - 1:
        tl.store(contenders.count + i_r, n_before + tl.sum(competes.to(tl.int32), 0))
