"""Spans of calls that come without any: every batch row is one sequence that fills all slots."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.device import is_capturing, stream_of
from attnsieve.spans import Spans

# Making them is four launches. They are nobody else's, so that nothing is written to them.
_known: dict[tuple[object, ...], Spans] = {}
_MOST = 64


def whole_spans(q: Tensor, k: Tensor) -> Spans:
    """`Spans.full` of q [B, Hq, Tq, D] and k [B, Hkv, Tk, D], made once per sizes and stream: another stream would not wait until
    they are written."""
    sizes = (q.shape[0], q.shape[2], k.shape[2])
    if is_capturing(q):
        # A graph computes nothing before it is replayed, and is replayed when what is known here may be gone.
        return Spans.full(*sizes, q.device)
    key = (sizes, q.device, stream_of(q))
    found = _known.get(key)
    if found is None:
        found = Spans.full(*sizes, q.device)
        if _is_real(found.batch):
            if len(_known) >= _MOST:
                _known.clear()
            _known[key] = found
    return found


def _is_real(tensor: Tensor) -> bool:
    """Not what torch makes while it only pretends to compute, or within torch.func's transforms."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
