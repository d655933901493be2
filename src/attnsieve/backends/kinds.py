"""Calls of one kind: what was checked and decided for the first of them holds for the others, and is kept with the layout.

For short calls checking, choosing and launching take longer than computing. A call is of a known kind only if everything that those
look at is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from attnsieve.backends.call import DECODE_QUERIES
from attnsieve.device import in_forward_mode
from attnsieve.layout import Layout
from attnsieve.spans import Spans

# q, k, v and the spans -> output and LSE.
Again = Callable[[Tensor, Tensor, Tensor, Spans], tuple[Tensor, Tensor]]
# Kinds of one layout: chunks of a growing text and prompts of all lengths would add up for ever.
_MOST_KINDS = 64


class Known(NamedTuple):
    """Who computes calls of a kind, and how it repeats them; without `again`, as any other call."""

    backend: str
    again: Again | None


def kind_of(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, spans: Spans | None, scale: float | None, backend: str
) -> Hashable | None:
    """The kind of a call without bias, or None if such calls are not remembered: of masks chosen from the input, with padding or
    packing, and those that autograd records or where it looks for tangents."""
    if layout.passing or layout.most_keys is not None or not (type(q) is type(k) is type(v) is Tensor):
        return None
    if q.requires_grad or k.requires_grad or v.requires_grad or not (scale is None or type(scale) is float):
        return None
    if in_forward_mode():
        return None
    device, (q_shape, k_shape, v_shape) = q.device, (q.shape, k.shape, v.shape)
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return None
    batch, _, queries, _ = q_shape
    keys = k_shape[2]
    if spans is not None and not (spans.whole == (batch, queries, keys) and _need_no_check(spans, device)):
        return None
    rest = (q.dtype, k.dtype, v.dtype, device, k.device, v.device, scale, backend)
    if queries > DECODE_QUERIES:
        return (q_shape, k_shape, v_shape, rest)
    # A text grows by a key at each step: kinds of decode know the power of two of keys only, as predictions of costs do. What else
    # is checked of that number is checked here.
    if v_shape[2] != keys or not queries <= keys <= layout.length:
        return None
    return (q_shape, keys.bit_length(), k_shape[:2], k_shape[3], v_shape[:2], v_shape[3], rest)


def _need_no_check(spans: Spans, device: torch.device) -> bool:
    """Whether kernels can read them as they are; on a CPU they are read and checked at every call."""
    return device.type != "cpu" and spans.is_plain_on(device)


def known(layout: Layout, kind: Hashable) -> Known | None:
    """What was decided for an earlier call of this kind."""
    found: Known | None = _kinds(layout).get(kind)
    return found


def remember(layout: Layout, kind: Hashable, decided: Known) -> None:
    """Keep what was decided."""
    kinds = _kinds(layout)
    if len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[kind] = decided


def _kinds(layout: Layout) -> dict[Hashable, Known]:
    return layout.schedule("kinds", dict)
