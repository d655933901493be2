"""Dynamic mask attention as a function of q, k, v and its three parameters."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attnsieve.attention import attend
from attnsieve.errors import require
from attnsieve.layout import Layout
from attnsieve.nn.cache import BoundedCache
from attnsieve.nn.scores import key_scores
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule
from attnsieve.replay import repeat
from attnsieve.spans import Spans


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dt_weight: Tensor,
    A: Tensor,
    keep_window_size: int,
    dt_bias: Tensor | None = None,
    window: int = 0,
    sinks: int = 0,
    union: bool = False,
    exponential: bool = True,
    spans: Spans | Segments | None = None,
    cache: BoundedCache | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over the `keep_window_size` best keys of each row's prefix (arXiv 2508.02124, Eq. 3 to 5).

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D], both after RoPE; v [B, Hkv, Tk, Dv]. The queries are the last Tq of the Tk slots.

    - The scores of keys come from v: dt_weight [Hkv, Hkv * Dv], dt_bias [Hkv], A [Hkv] and `exponential` as in `key_scores`.
    - Which keys a row keeps: `keep_window_size`, `window`, `sinks` and `union` as in `SelectionRule`.
    - spans: padding and packed documents; `Segments` where they are built on the device. Slots in no document may hold
      anything, NaN too, and give output 0.
    - cache: q, k and v are the next tokens of its text (at first the whole prompt, left padding allowed), earlier keys come
      from it.
    - `scale` and `backend` as in `attend`.

    Returns [B, Hq, Tq, Dv] in q's dtype; differentiable in q, k, v (also through the scores), dt_weight, dt_bias and A, not
    through the choice of keys: a key never admitted learns nothing about its score.

    Raises UserError for shapes that do not fit, spans whose queries are not their last slots, a cache of another rule,
    NaN scores and infinite biases (on a GPU these are not looked for, as that would read the device: they make the outputs NaN).
    """
    rule = SelectionRule(keep_window_size, window, sinks, union)
    score = partial(key_scores, dt_weight=dt_weight, dt_bias=dt_bias, a=A, exponential=exponential)
    select = partial(_select_and_attend, rule=rule, scale=scale, backend=backend)
    if spans is None and cache is None and (scale is None or type(scale) is float):
        given = [x for x in (q, k, v, dt_weight, A, dt_bias) if x is not None]
        kind = ("dynamic mask", rule, exponential, scale, backend, dt_bias is None)
        return repeat(kind, given, lambda: select(q, k, v, *score(v), None))
    segments = _segments(spans, k.shape[0], q.shape[2], k.shape[2])
    if segments is not None:
        q, k, v = blank(segments, q, k, v)
    if cache is None:
        return select(q, k, v, *score(v), segments)
    require(cache.rule == rule, f"the cache was made for {cache.rule}, the layer asks for {rule}: start a new cache")
    real = None if segments is None else _left_padded(segments)
    return cache.attend(q, k, v, *score(v), real=real, scale=scale, backend=backend, parameters=(dt_weight, A))


def _select_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    sigma: Tensor,
    segments: Segments | None,
    *,
    rule: SelectionRule,
    scale: float | None,
    backend: str,
) -> Tensor:
    layout = Layout(k.shape[2], rule.ends(sigma, segments), most_keys=rule.slots)
    out = attend(q, k, v, layout, scale=scale, key_bias=delta, backend=backend)
    assert isinstance(out, Tensor)
    return out


def blank(segments: Segments, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, D] each, with zeros in the padding among its slots, the last T of the segments: 0 * NaN would spread."""
    padding = segments.padding[:, None, :, None]
    return tuple(tensor.masked_fill(padding[:, :, -tensor.shape[2] :], 0.0) for tensor in tensors)


def _segments(spans: Spans | Segments | None, batch: int, q_slots: int, k_slots: int) -> Segments | None:
    if spans is None or isinstance(spans, Segments):
        return spans
    if spans.batch.device.type == "cpu":
        spans.check(batch, q_slots, k_slots, k_slots)
        aligned = spans.k_start + spans.k_len - (spans.q_start + spans.q_len) == k_slots - q_slots
        require(
            bool(torch.all(aligned | (spans.k_len == 0))),
            f"the queries of every span must lie on the last of the {k_slots} key slots, as its last {q_slots} slots do",
        )
    return Segments.of_spans(spans, batch, k_slots)


def _left_padded(segments: Segments) -> Tensor:
    """bool [B, T]: the real slots of rows that hold one document each."""
    if segments.start.device.type == "cpu":
        one = segments.start == segments.start[:, -1:]
        require(
            bool((one | ~segments.real).all()),
            "a cache continues one text per row: pass use_cache=False (cache=None) for packed documents",
        )
    return segments.real
