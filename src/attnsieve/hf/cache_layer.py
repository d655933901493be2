"""One layer of a SparseCache, and where it meets the layer's attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attnsieve.backends.ragged import Index
from attnsieve.device import multiprocessors
from attnsieve.errors import UserError, require
from attnsieve.patterns import Pattern
from attnsieve.ragged import Kept, RaggedStore

# Programs per multiprocessor between which a decode step is shared.
PROGRAMS = 4

# Attention over all keys and values so far, [B, T, Hq, Dv].
Whole = Callable[[Tensor, Tensor], Tensor]


class Seat:
    """Where the cache of a layer meets the layer's attention, since transformers hands only tensors from one to the other.

    `row` is the layer's patterns; `whole` says why the layer needs all its keys, if it does. `update` leaves the cache layer in
    `handed`, and the attention call that follows takes it. Copies of a cache share their seats.
    """

    def __init__(self, layer: int, row: tuple[Pattern, ...], whole: str | None) -> None:
        self.layer, self.row, self.whole = layer, row, whole
        self.active = True
        self.handed: RaggedLayer | None = None
        self._answered: weakref.ref[Tensor] | None = None

    def take(self, key: Tensor) -> RaggedLayer | None:
        """The cache layer that `key`, the keys of this call, went to, if it is a ragged one.

        Raises UserError for layers that attend to the same keys twice: the second call would take them for the whole text.
        """
        handed, self.handed = self.handed, None
        again = handed is None and self._answered is not None and self._answered() is key
        require(not again, f"layer {self.layer} attends twice to what it stores: use transformers' own cache for this model")
        self._answered = None if handed is None else weakref.ref(key)
        return handed

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        return self


class Indices:
    """The storage plans of a cache: layers with the same patterns share one, and its vectors on every device."""

    def __init__(self, kv_heads: int, capacity: int) -> None:
        self.kv_heads, self._capacity = kv_heads, capacity
        self._kept: dict[tuple[Pattern, ...], Kept] = {}
        self._index: dict[tuple[Kept, torch.device, int], Index] = {}

    def kept(self, row: tuple[Pattern, ...]) -> Kept:
        """What is kept of a layer with these patterns. Raises UserError with the reason where all must be."""
        if row not in self._kept:
            self._kept[row] = Kept.of(row, self.kv_heads, self._capacity)
        return self._kept[row]

    def index(self, kept: Kept, device: torch.device, batch: int) -> Index:
        """Its vectors on `device`."""
        key = (kept, device, -(-PROGRAMS * multiprocessors(device) // batch))
        if key not in self._index:
            self._index[key] = kept.index(device, key[2])
        return self._index[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors."""
        return sum(t.nbytes for index in self._index.values() for t in (*index.heads, *index[1:]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Indices:
        return self


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys. Until every row of the batch is past the captured corner all are kept; from then on a `RaggedStore`.

    `update` then returns the new tokens alone: the layer's attention, which takes this object from the seat, finds the others
    here. Masks are made for all tokens so far, as with a dynamic cache.
    """

    is_sliding = False

    def __init__(self, seat: Seat, indices: Indices, max_length: int) -> None:
        super().__init__()
        self.seat, self.max_length = seat, max_length
        self.kept, self._indices = indices.kept(seat.row), indices
        self.seen = self.past = 0
        self.store: RaggedStore | None = None
        self._start: list[int] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by the first call of attention."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce the next tokens, [B, Hkv, T, width]; returns all keys and values, or the next ones once others may be gone."""
        new = key_states.shape[2]
        require(self.seat.active, "the plan that this cache belongs to is no longer applied: make a cache from the new handle")
        require(
            self.seen + new <= self.max_length,
            f"the cache was made for {self.max_length} tokens, these would be {self.seen + new}: make it with a larger "
            "max_length",
        )
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        require(not recorded, "keys in a SparseCache carry no gradient: use torch.no_grad() or inference_mode()")
        self.past, self.seen = self.seen, self.seen + new
        self.is_initialized = True
        self.seat.handed = self
        if self.store is not None:
            return key_states, value_states
        if self.keys is not None:
            assert self.values is not None
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def steps(self, query: Tensor, start: list[int], backend: str) -> bool:
        """Whether the tokens of the last update are a decode step that ragged storage can serve by itself.

        `start`: per batch row the slot of its first token, padding lies before; the number of slots where all is padding.
        Raises UserError if that is not what earlier calls said.
        """
        known = [min(slot, self.past) for slot in start] if self._start is None else self._start
        same = len(start) == len(known) and all(
            now == then or then == self.past <= now for now, then in zip(start, known, strict=True)
        )
        require(
            same,
            "the batch or its padding changed in mid-text: a SparseCache serves one batch, padded on the left, and every later "
            "token is real",
        )
        return self.store is not None and query.shape[2] == 1 and backend != "reference" and max(start) < self.seen

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str) -> Tensor:
        """Attention of one new token per row, [B, 1, Hq, Dv]."""
        assert self.store is not None
        out, _ = self.store.step(query, key, value, scale, backend)
        return out.transpose(1, 2).contiguous()

    def attend(self, key: Tensor, value: Tensor, start: list[int], whole: Whole) -> Tensor:
        """Attention of the tokens of the last update, [B, T, Hq, Dv], by `whole`, which is given all keys and values; then drops
        those that no later row reads. Raises UserError if the layer has other KV heads than the storage was planned for."""
        planned = self._indices.kv_heads
        require(
            key.shape[1] == planned,
            f"layer {self.seat.layer} has {key.shape[1]} KV heads, its configuration says {planned}: use transformers' own cache",
        )
        if self.store is None:
            out = whole(key, value)
            self._settle(key, value, start)
        else:
            out = whole(*self.store.text(key, value, start, self.past))
            self.store.fill(key, value, start, self.past)
        self._start = start
        return out

    def _settle(self, key: Tensor, value: Tensor, start: list[int]) -> None:
        """Drop what no later row reads, unless the next row of some sequence is in the corner."""
        if self.seen - max(start) < self.kept.corner:
            return
        index = self._indices.index(self.kept, key.device, len(key))
        self.store = RaggedStore(self.kept, index, key, value)
        self.store.fill(key, value, start, 0)
        # Empty, not None: models with cross-attention ask every layer that has been used for its size.
        self.keys = self.values = key.new_empty(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.max_length

    @property
    def nbytes(self) -> int:
        """Bytes in use for keys and values."""
        if self.store is not None:
            return self.store.nbytes
        return sum(tensor.nbytes for tensor in (self.keys, self.values) if tensor is not None)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.store = self._start = None
        self.seen = self.past = 0
        self.is_initialized = False
        self.seat.handed = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the batch rows `beam_idx`, in that order: beams, repeats, finished rows."""
        if self.store is not None:
            self.store = self.store.select(beam_idx)
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = (x.index_select(0, beam_idx.to(x.device)) for x in (self.keys, self.values))
        if self._start is not None:
            alike = len(set(self._start)) == 1
            self._start = self._start[:1] * len(beam_idx) if alike else [self._start[row] for row in beam_idx.tolist()]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times."""
        if self._start is not None:
            self.reorder_cache(torch.arange(len(self._start)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UserError unless nothing is to be removed: dropped keys are gone."""
        if tokens_to_remove != 0:
            raise UserError("a SparseCache cannot take tokens back (assisted decoding, cropping): use transformers' own cache")

    def offload(self) -> None:
        raise UserError("a SparseCache cannot be offloaded")
