"""From transformers' masks to spans: what a mask says about sequences, proven or refused, never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from attnsieve.spans import Spans

# The mask function notes here which key slot the first query's own key is in; nothing else in a call says so.
OFFSET = "_attnsieve_offset"
# And here the slots that the cache has dropped before the first of the mask, and the caller's own mask [B, tokens so far] or None.
DROPPED, PADDING = "_attnsieve_dropped", "_attnsieve_padding"
# Models whose layers share keys and hand the positions of all tokens to each, also to those that run for the last queries alone.
TELLING = ("gemma3n_text", "gemma4_text", "gemma4_unified_text")
# Rows of a mask are compared in pieces of at most this many entries, so that reading a mask stays small beside the mask.
PIECE = 1 << 24


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for sdpa, noting the slot of the first query's own key on it."""
    config = kwargs.get("config")
    if getattr(config, "num_kv_shared_layers", 0) and getattr(config, "model_type", None) not in TELLING:
        # Layers that share keys may run for the last queries alone, with their rows of the mask; where there is none nothing
        # says which rows they are.
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is None or torch.compiler.is_compiling():
        return mask
    # Static caches call .contiguous() on the mask, which returns the same object only if it is contiguous already.
    mask = mask.contiguous()
    setattr(mask, OFFSET, int(kwargs.get("q_offset", 0)) - int(kwargs.get("kv_offset", 0)))
    setattr(mask, DROPPED, int(kwargs.get("kv_offset", 0)))
    setattr(mask, PADDING, kwargs.get("attention_mask"))
    return mask


def first_own_slot(mask: Tensor) -> int:
    """The key slot of the first query's own key; of masks without a note, as if the queries were the last keys."""
    noted: int | None = getattr(mask, OFFSET, None)
    return mask.shape[3] - mask.shape[2] if noted is None else noted


def spans_of_mask(mask: Tensor) -> Spans | str:
    """The spans that say exactly what `mask` says, or the reason why there are none.

    mask: bool [B, 1, Tq, Tk], True where a query may read a key. It is explained when every query reads one run of key
    slots that ends with its own key, runs of one sequence start at the same slot, and sequences of a row do not overlap.
    Queries that read nothing are padding, and so are queries whose own key no query reads (right padding, trusted only in
    masks that `mask_function` made). Reads the device.
    """
    runs = _runs(mask[:, 0])
    if runs is None:
        return "the mask has rows with gaps: it is neither causal, padded nor packed"
    first, last = runs
    own = _own_slots(last, first_own_slot(mask))
    real = (last == own) & (last >= first)
    stray = (last != own) & (last >= first)
    if bool(stray.any()) and not (hasattr(mask, OFFSET) and _own_key_unread(mask[:, 0], own, stray)):
        return "the mask has queries that do not end with their own key: it is not causal"
    rows = list(_sequences(first, real, own))
    if _overlap(rows):
        return "the mask lets several sequences read the same key: it is neither causal, padded nor packed"
    return Spans.of(rows, mask.device)


@dataclass(frozen=True, eq=False)
class Within:
    """What a sliding window's mask says. spans: of positions, as if the cache had dropped no key; stored: of the keys that it
    still has; earliest: the position of the first query in its sequence, the least of all."""

    spans: Spans
    stored: Spans
    earliest: int

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int, int]], dropped: int, device: torch.device) -> Within:
        """From rows as in `Spans.of`, whose key slots count from before the first `dropped`."""
        stored = [(b, q, n, max(k - dropped, 0), k + length - max(k, dropped)) for b, q, n, k, length in rows]
        earliest = min((length - n for _, _, n, _, length in rows), default=0)
        return cls(Spans.of(rows, device), Spans.of(stored, device), earliest)


def spans_within(mask: Tensor, window: int) -> Within | str:
    """The spans that, together with a sliding window, say exactly what `mask` says, or the reason why there are none.

    mask: as in `spans_of_mask`, made by `mask_function`. Key slots of the spans count those that the cache has dropped. A query
    that reads fewer keys than the window says where its sequence starts; of the others the query before says it, and of
    those that a call begins with the caller's padding. Reads the device.
    """
    runs = _runs(mask[:, 0])
    if runs is None or not hasattr(mask, DROPPED):
        return "the mask is not one that transformers makes for a sliding window"
    dropped = int(getattr(mask, DROPPED))
    first, last = (run + dropped for run in runs)
    own = _own_slots(last, first_own_slot(mask) + dropped)
    read = last - first + 1
    real, stray = (last == own) & (read > 0), (last != own) & (read > 0)
    padded = not bool(stray.any()) or _own_key_unread(mask[:, 0], own - dropped, stray)
    if not padded or bool((read > window).any()):
        return "the mask is not that of the layer's sliding window"
    before = _padded(mask, len(first))
    starts = _starts_within(first, real & (read < window), before)
    # The caller's mask tells of one text a row: what starts later starts after a hole in it.
    late = starts > (first if getattr(mask, PADDING) is None else first.minimum(before[:, None]))
    if bool((real & late).any()) or not _unpadded_from(mask, starts, own, real & (read == window)):
        return "the mask does not say where the texts in its window start"
    rows = list(_sequences(starts, real, own))
    if _overlap(rows):
        return "the mask is not that of the layer's sliding window"
    return Within.of(rows, dropped, mask.device)


def _starts_within(first: Tensor, tells: Tensor, before: Tensor) -> Tensor:
    """int64 [B, Tq]: where the sequence of each query starts: `first` of the last query that tells, up to it, else `before` [B]."""
    teller = torch.where(tells, torch.arange(first.shape[1]), -1).cummax(1).values
    return torch.where(teller >= 0, first.gather(1, teller.clamp_min(0)), before[:, None])


def _padded(mask: Tensor, batch: int) -> Tensor:
    """int64 [B]: slots of padding before the first token, by the caller's mask."""
    padding: Tensor | None = getattr(mask, PADDING)
    return torch.zeros(batch, dtype=torch.int64) if padding is None else padding.bool().long().argmax(1).cpu()


def _unpadded_from(mask: Tensor, starts: Tensor, own: Tensor, cut: Tensor) -> bool:
    """Whether the caller's mask hides no token between the start of a sequence and any query marked in `cut`."""
    padding: Tensor | None = getattr(mask, PADDING)
    if padding is None or not bool(cut.any()):
        return True
    hidden = torch.nn.functional.pad((~padding.bool()).cpu().cumsum(1), (1, 0))
    upto = (own + 1).clamp_max(padding.shape[1])
    return not bool((cut & (hidden.gather(1, upto) > hidden.gather(1, starts.clamp_max(padding.shape[1])))).any())


def _runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last key read, int64 [B, Tq] on the CPU (last < first: none), or None unless every row is one run of keys."""
    keys = torch.arange(mask.shape[-1], device=mask.device)
    firsts, lasts, whole = [], [], []
    for rows in mask.split(max(1, PIECE // (mask.shape[0] * mask.shape[-1])), dim=1):
        first = rows.view(torch.uint8).argmax(-1)
        last = first + rows.sum(-1) - 1
        whole.append((((keys >= first[..., None]) & (keys <= last[..., None])) == rows).all())
        firsts.append(first)
        lasts.append(last)
    if not bool(torch.stack(whole).all()):
        return None
    return torch.cat(firsts, dim=1).cpu(), torch.cat(lasts, dim=1).cpu()


def _own_slots(last: Tensor, offset: int) -> Tensor:
    """int64 [B, Tq]: the slot of every query's own key; of a single query, the last key it reads."""
    if last.shape[1] == 1:
        return last
    return (offset + torch.arange(last.shape[1])).expand_as(last)


def _own_key_unread(mask: Tensor, own: Tensor, stray: Tensor) -> bool:
    """Whether no query reads the own key of any query marked in `stray`."""
    batch, query = stray.nonzero(as_tuple=True)
    slots = own[batch, query]
    if int(slots.max()) >= mask.shape[-1]:
        return False
    return not bool(mask.any(1)[batch.to(mask.device), slots.to(mask.device)].any())


def _sequences(first: Tensor, real: Tensor, own: Tensor) -> Iterator[tuple[int, int, int, int, int]]:
    """(batch, q_start, q_len, k_start, k_len) of every run of real queries that start at the same key."""
    for b, row in enumerate(torch.where(real, first, -1)):
        q_start = 0
        starts, lengths = torch.unique_consecutive(row, return_counts=True)
        for k_start, q_len in zip(starts.tolist(), lengths.tolist(), strict=True):
            if k_start >= 0:
                yield b, q_start, q_len, k_start, int(own[b, q_start]) + q_len - k_start
            q_start += q_len


def _overlap(rows: list[tuple[int, int, int, int, int]]) -> bool:
    """Whether sequences of one batch row share key slots; their last slots ascend, so neighbours tell."""
    return any(a[0] == b[0] and b[3] < a[3] + a[4] for a, b in pairwise(rows))
