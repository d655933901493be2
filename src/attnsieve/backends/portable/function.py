"""Forward and backward of the portable backend, one part at a time.

Shapes in names: N sequences computed together, R = query heads x rows of the part, M rows, U tile keys, S scattered diagonals,
D and E the widths of K and V, T key slots of the sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from attnsieve.backends.call import Call
from attnsieve.backends.portable.parts import Part, Slots, parts_of, slots_of


def why_not(call: Call) -> str | None:
    """Serves everything."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype, LSE [B, Hq, Tq] in float32 (float64 for float64 inputs).

    Low-precision inputs are computed in float32. Gradients come from an explicit backward pass that keeps O(n) memory.
    """
    out, lse = _Attend.apply(call, call.q, call.k, call.v, call.key_bias)
    return out, lse


class _Sequences:
    """One KV head of the sequences in `slots`: reads and writes of q, k and v rows in working precision."""

    def __init__(self, call: Call, slots: Slots, kv_head: int, tensors: list[Tensor | None]) -> None:
        self.slots, self.kv_head, self.scale = slots, kv_head, call.scale
        (q, k, v), bias = cast(list[Tensor], tensors[:3]), tensors[3]
        self.batch = _as_slice(slots.batch)
        self.first_row = slots.k_len - slots.q_len
        self.q, self.k_NTD, self.v_NTE = q, self.keys_of(k), self.keys_of(v)
        self.bias_NT = None if bias is None else self.keys_of(bias)
        self.bad_NT: Tensor | None = None

    def keys_of(self, tensor: Tensor) -> Tensor:
        """The key slots of these sequences; a view when their batch rows are adjacent, else a copy."""
        return tensor[self.batch][:, self.kv_head, self.slots.k_start : self.slots.k_start + self.slots.k_len]

    def queries_of(self, tensor: Tensor, part: Part) -> Tensor:
        """[N, heads, M, ...] of the part."""
        start = self.slots.q_start + int(part.rows[0]) - self.first_row
        return tensor[self.batch][:, _as_slice(part.heads), start : start + len(part.rows)]

    def put(self, tensor: Tensor, part: Part, value_NRx: Tensor) -> None:
        """Write rows of the part."""
        start = self.slots.q_start + int(part.rows[0]) - self.first_row
        value = value_NRx.unflatten(1, (len(part.heads), len(part.rows))).to(tensor.dtype)
        for n, b in enumerate(self.slots.batch):
            tensor[b, _as_slice(part.heads), start : start + len(part.rows)] = value[n]

    def add(self, grad: Tensor, keys: Tensor, value: Tensor) -> None:
        """grad[batch, kv_head, k_start + keys] += value; repeated keys accumulate."""
        flat = value.flatten(1, keys.ndim)
        for n, b in enumerate(self.slots.batch):
            grad[b, self.kv_head, self.slots.k_start :].index_add_(0, keys.flatten(), flat[n])

    def scores(self, q_NRD: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
        """Scaled, biased and masked scores: [N, R, U] of tile keys, [N, R, S] of scattered diagonals."""
        tile = torch.baddbmm(self._bias(part.keys), q_NRD, self._rows(self.k_NTD, part.keys).mT, alpha=self.scale)
        if part.mask is not None:
            _by_rows(tile, part)[..., part.full :].masked_fill_(~part.mask, -torch.inf)
        if part.row_keys is None or part.row_mask is None:
            return tile, None
        row = _row_product(q_NRD, self._rows(self.k_NTD, part.row_keys), part) * self.scale
        if self.bias_NT is not None:
            _by_rows(row, part).add_(self._rows(self.bias_NT, part.row_keys)[:, None])
        _by_rows(row, part).masked_fill_(~part.row_mask, -torch.inf)
        return tile, row

    def _bias(self, keys: Tensor) -> Tensor:
        if self.bias_NT is None:
            return self.k_NTD.new_zeros(1, 1, 1)
        return self._rows(self.bias_NT, keys)[:, None]

    def _rows(self, tensor: Tensor, keys: Tensor) -> Tensor:
        return tensor.index_select(1, keys.flatten()).view(len(tensor), *keys.shape, *tensor.shape[2:])

    def values(self, keys: Tensor) -> Tensor:
        """V at `keys`: [N, *keys.shape, E]."""
        return self._rows(self.v_NTE, keys)

    def set_aside_bad_values(self) -> None:
        """In a product of tiles 0 * NaN is NaN for every row: values that are not finite are zeroed and their keys noted."""
        self.bad_NT = ~self.v_NTE.isfinite().all(-1)
        self.v_NTE = self.v_NTE.masked_fill(self.bad_NT[..., None], 0.0)

    def spoilt(self, tile: Tensor, row: Tensor | None, part: Part) -> Tensor | None:
        """bool [N, R, 1]: rows whose scores keep a key whose values were set aside; None where there is no such key."""
        if self.bad_NT is None:
            return None
        found = ((tile != -torch.inf) & self._rows(self.bad_NT, part.keys)[:, None]).any(-1, keepdim=True)
        if row is not None and part.row_keys is not None:
            bad = self._rows(self.bad_NT, part.row_keys)[:, None]
            found |= (_by_rows(row != -torch.inf, part) & bad).flatten(1, 2).any(-1, keepdim=True)
        return found

    def keys(self, keys: Tensor) -> Tensor:
        """K at `keys`: [N, *keys.shape, D]."""
        return self._rows(self.k_NTD, keys)


def _as_slice(indices: list[int]) -> slice | list[int]:
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _by_rows(tensor_NRx: Tensor, part: Part) -> Tensor:
    """A view [N, heads, M, x]."""
    return tensor_NRx.view(len(tensor_NRx), len(part.heads), len(part.rows), -1)


def _row_product(a_NRx: Tensor, b_NMSx: Tensor, part: Part) -> Tensor:
    """[N, R, S]: each row of `a` with the S vectors of its own row in `b`."""
    return torch.einsum("ngmx,nmsx->ngms", _by_rows(a_NRx, part), b_NMSx).flatten(1, 2)


def _row_sum(weights_NRS: Tensor, b_NMSx: Tensor, part: Part) -> Tensor:
    """[N, R, x]: weighted sum of the S vectors of each row."""
    return torch.einsum("ngms,nmsx->ngmx", _by_rows(weights_NRS, part), b_NMSx).flatten(1, 2)


def _row_outer(weights_NRS: Tensor, a_NRx: Tensor, part: Part) -> Tensor:
    """[N, M, S, x]: what the S keys of each row receive, summed over heads."""
    return torch.einsum("ngms,ngmx->nmsx", _by_rows(weights_NRS, part), _by_rows(a_NRx, part))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        work = _work_dtype(q)
        tensors = [None if tensor is None else tensor.detach().to(work) for tensor in (q, k, v, bias)]
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        lse = torch.full(q.shape[:3], -torch.inf, dtype=work, device=q.device)
        finite = bool(v.isfinite().all())
        for slots in slots_of(call):
            for kv_head in range(k.shape[1]):
                sequences = _Sequences(call, slots, kv_head, tensors)
                if not finite:
                    sequences.set_aside_bad_values()
                for part in parts_of(call, slots, kv_head):
                    _forward_part(sequences, part, out, lse)
        ctx.call = call
        ctx.save_for_backward(q, k, v, bias, lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        work = lse.dtype
        tensors = [None if tensor is None else tensor.detach().to(work) for tensor in inputs]
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]
        for slots in slots_of(ctx.call):
            for kv_head in range(inputs[1].shape[1]):
                sequences = _Sequences(ctx.call, slots, kv_head, tensors)
                for part in parts_of(ctx.call, slots, kv_head):
                    _backward_part(sequences, part, d_out.to(work), d_lse.to(work), lse, grads)
        return None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward_part(sequences: _Sequences, part: Part, out: Tensor, lse: Tensor) -> None:
    q_NRD = sequences.queries_of(sequences.q, part).flatten(1, 2)
    if part.keys.numel() == 0 and part.row_keys is None:
        return
    tile, row = sequences.scores(q_NRD, part)
    peak = tile.amax(-1, keepdim=True) if tile.shape[-1] else tile.new_full((*tile.shape[:-1], 1), -torch.inf)
    if row is not None:
        peak = torch.maximum(peak, row.amax(-1, keepdim=True))
    peak.masked_fill_(peak == -torch.inf, 0.0)
    spoilt = sequences.spoilt(tile, row, part)
    weights = tile.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    product = weights @ sequences.values(part.keys)
    if row is not None and part.row_keys is not None:
        row_weights = row.sub_(peak).exp_()
        total += row_weights.sum(-1, keepdim=True)
        product += _row_sum(row_weights, sequences.values(part.row_keys), part)
    product /= total.masked_fill(total == 0, 1.0)
    sequences.put(out, part, product if spoilt is None else product.masked_fill_(spoilt, torch.nan))
    sequences.put(lse[..., None], part, total.log() + peak)


def _backward_part(sequences: _Sequences, part: Part, d_out: Tensor, d_lse: Tensor, lse: Tensor, grads: list[Any]) -> None:
    """dS = P * (dP - shift) with shift = rowsum(P * dP), less what flows in through the LSE itself.

    Usually that sum is taken from the output instead, rowsum(dO * O). Rounded to half precision it would reach the bias of every
    key of the row with one sign.
    """
    q_NRD, d_NRE = (sequences.queries_of(tensor, part).flatten(1, 2) for tensor in (sequences.q, d_out))
    d_lse_NR, lse_NR = (sequences.queries_of(tensor, part).flatten(1, 2)[..., None] for tensor in (d_lse, lse))
    # A row that keeps nothing has LSE -inf; its weights are 0, not exp(-inf + inf), whatever flows into its LSE.
    nothing = lse_NR == -torch.inf
    d_lse_NR, lse_NR = d_lse_NR.masked_fill(nothing, 0.0), lse_NR.masked_fill(nothing, 0.0)
    tile, row = sequences.scores(q_NRD, part)
    weights = tile.sub_(lse_NR).exp_()
    d_weights = d_NRE @ sequences.values(part.keys).mT
    shift = (weights * d_weights).sum(-1, keepdim=True) - d_lse_NR
    if row is None or part.row_keys is None:
        d_tile = weights * (d_weights - shift)
        d_q = d_tile @ sequences.keys(part.keys)
    else:
        row_weights = row.sub_(lse_NR).exp_()
        d_row_weights = _row_product(d_NRE, sequences.values(part.row_keys), part)
        shift += (row_weights * d_row_weights).sum(-1, keepdim=True)
        d_tile, d_row = weights * (d_weights - shift), row_weights * (d_row_weights - shift)
        d_q = d_tile @ sequences.keys(part.keys) + _row_sum(d_row, sequences.keys(part.row_keys), part)
        sequences.add(grads[1], part.row_keys, _row_outer(d_row, q_NRD, part) * sequences.scale)
        sequences.add(grads[2], part.row_keys, _row_outer(row_weights, d_NRE, part))
        if grads[3] is not None:
            sequences.add(grads[3], part.row_keys, _by_rows(d_row, part).sum(1))
    sequences.put(grads[0], part, d_q * sequences.scale)
    sequences.add(grads[1], part.keys, d_tile.mT @ q_NRD * sequences.scale)
    sequences.add(grads[2], part.keys, weights.mT @ d_NRE)
    if grads[3] is not None:
        sequences.add(grads[3], part.keys, d_tile.sum(1))
