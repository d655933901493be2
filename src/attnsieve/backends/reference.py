"""The oracle: masked softmax written out. O(n^2) memory; float64 when given float64; everything else is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.backends.call import Call


def why_not(call: Call) -> str | None:
    """Serves everything."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype, LSE [B, Hq, Tq] in float32 (float64 for float64 inputs).

    Low-precision inputs are computed in float32. A row with no key gives output 0 and LSE -inf.
    """
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (tensor.to(work).repeat_interleave(group, dim=1) for tensor in (call.k, call.v))
    q = call.q.to(work)
    batch, heads, q_slots, _ = q.shape
    out = q.new_zeros(batch, heads, q_slots, v.shape[-1])
    lse = q.new_full((batch, heads, q_slots), -torch.inf)
    for s, (b, q0, nq, k0, nk) in enumerate(call.spans.rows()):
        if nq == 0:
            continue
        queries, keys = slice(q0, q0 + nq), slice(k0, k0 + nk)
        scores = q[b, :, queries] @ k[b, :, keys].mT * call.scale
        if call.key_bias is not None:
            scores = scores + call.key_bias[b, :, None, keys].to(work).repeat_interleave(group, dim=0)
        mask = head_mask(call, s, torch.arange(nk - nq, nk), torch.arange(nk))
        part, total = masked_softmax_matmul(scores, mask, v[b, :, keys])
        out[b, :, queries], lse[b, :, queries] = part, total
    return out.to(call.q.dtype), lse


def head_mask(call: Call, s: int, rows: Tensor, keys: Tensor) -> Tensor:
    """bool [Hq, rows, keys] of sequence `s`."""
    layout = call.layout
    mask = layout.dense(rows.to(layout.device), keys.to(layout.device))[s if layout.sequences > 1 else 0]
    return mask.repeat_interleave(call.q.shape[1] // layout.heads, dim=0).to(call.q.device)


def masked_softmax_matmul(scores: Tensor, mask: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over kept scores times v, and the LSE. Safe for rows that keep nothing, also in the backward pass.

    Values that are not finite make NaN of the rows that keep their key, and of no others (0 * NaN would).
    """
    peak = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True).detach()
    peak = torch.where(peak.isfinite(), peak, 0.0)
    weights = torch.where(mask, (scores - peak).masked_fill(~mask, 0.0).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    kept = total != 0
    safe = torch.where(kept, total, 1.0)
    lse = torch.where(kept, safe.log() + peak, -torch.inf)
    bad = ~v.isfinite().all(-1)
    out = weights / safe @ v.masked_fill(bad[..., None], 0.0)
    return out.masked_fill((mask & bad[..., None, :]).any(-1, keepdim=True), torch.nan), lse.squeeze(-1)
