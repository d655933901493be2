"""RaggedStore: the keys and values of one layer that later rows can still read, every KV head with slots of its own number."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from attnsieve.backends.call import problem_of_scale
from attnsieve.backends.ragged import Index, Memory
from attnsieve.device import on_device_of
from attnsieve.errors import require
from attnsieve.ragged.decode import Step, step_of
from attnsieve.ragged.kept import Kept


class RaggedStore:
    """One flat buffer of keys and one of values, [B, slots, width]; see `attnsieve.backends.ragged` for what lies where.

    Slots and positions follow from the number of positions so far, which lives on the device: a step waits for nothing and
    can be captured in a CUDA graph.
    """

    def __init__(self, kept: Kept, index: Index, key: Tensor, value: Tensor) -> None:
        """Empty, for tensors like `key` [B, Hkv, ..., D] and `value` [B, Hkv, ..., Dv]; `index` is that of `kept` on their device."""
        self.kept, self.index = kept, index
        batch, heads = key.shape[:2]
        self.memory = Memory(
            key.new_zeros(batch, kept.slots, key.shape[-1]),
            value.new_zeros(batch, kept.slots, value.shape[-1]),
            torch.zeros(batch, heads, 2, dtype=torch.int32, device=key.device),
        )
        self._steps: dict[Hashable, Step] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and state; the index is shared between layers and not counted."""
        return sum(tensor.nbytes for tensor in self.memory)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Store the next token of every row and attend to what it keeps: out [B, Hq, 1, Dv] in q's dtype, LSE [B, Hq, 1].

        q [B, Hq, 1, D]; k [B, Hkv, 1, D]; v [B, Hkv, 1, Dv]. `backend`: auto, portable or triton. Exact for rows from the
        corner on. Raises UserError for tensors that do not fit the stored ones and a backend that cannot serve.
        """
        kind = (*((x.shape, x.dtype, x.device) for x in (q, k, v)), scale, backend)
        if kind not in self._steps:
            self._check_step(q, k, v, scale)
            self._steps[kind] = step_of(q, v, self.memory, self.index, scale, backend)
        with on_device_of(q):
            return self._steps[kind](q, k, v)

    def fill(self, k: Tensor, v: Tensor, start: Sequence[int], past: int) -> None:
        """Store those of the next T tokens that rows after them can read, in place of keys that none of those reads.

        k [B, Hkv, T, D], v [B, Hkv, T, Dv]. Slots of a whole cache are meant by `start` [B], where the sequence of a batch row
        begins (to the left is padding), and `past`, where the T tokens begin.
        """
        self._check(k, v)
        tokens, device = k.shape[2], k.device
        first = torch.tensor(start, device=device)[:, None]
        before, length = (past - first).clamp_min(0), past + tokens - first
        head, position = self._positions(length)
        new = ((position >= before) & (position < length))[..., None]
        row, source = torch.arange(len(k), device=device)[:, None], (first + position - past).clamp(0, tokens - 1)
        for stored, given in ((self.memory.key, k), (self.memory.value, v)):
            stored.copy_(torch.where(new, given[row, head, source], stored))
        self._advance(length)

    def text(self, k: Tensor, v: Tensor, start: Sequence[int], past: int) -> tuple[Tensor, Tensor]:
        """Keys and values in the slots of a whole cache, [B, Hkv, past + T, width]: the stored ones, zeros where none is stored,
        and the next T tokens `k`, `v`. Arguments as in `fill`."""
        self._check(k, v)
        batch, heads, tokens, _ = k.shape
        slots = past + tokens
        length = self.memory.state[:, :1, 0].long()
        head, position = self._positions(length)
        first = torch.tensor(start, device=k.device)[:, None]
        filled = (position >= 0) & (position < length)
        # Empty slots go behind the last one.
        place = torch.where(filled, head * slots + first + position, heads * slots)
        row = torch.arange(batch, device=k.device)[:, None]
        whole = []
        for stored, given in ((self.memory.key, k), (self.memory.value, v)):
            buffer = given.new_zeros(batch, heads * slots + 1, given.shape[-1])
            buffer[row, place] = stored
            full = buffer[:, :-1].unflatten(1, (heads, slots))
            full[:, :, past:] = given
            whole.append(full)
        return whole[0], whole[1]

    def select(self, rows: Tensor) -> Self:
        """A store of the batch rows `rows`, int64 [rows], in that order."""
        new = object.__new__(type(self))
        new.kept, new.index = self.kept, self.index
        new.memory = Memory(*(tensor.index_select(0, rows.to(tensor.device)) for tensor in self.memory))
        new._steps = {}
        return new

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: no kernels."""
        return {**self.__dict__, "_steps": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.select(torch.arange(len(self.memory.key)))

    def _positions(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """KV head of every slot, int64 [slots], and the position that it holds of texts of `length` [B, 1] positions, int64
        [B, slots]: negative, or not below the length, where it holds none."""
        heads, total = self.index.heads, self.kept.slots
        head = torch.repeat_interleave(heads.own + heads.reach, output_size=total)
        place = torch.arange(total, device=length.device) - heads.slot[head]
        own, reach = heads.own[head], heads.reach[head]
        in_column = place < own
        column = self.index.entries[torch.where(in_column, heads.first_column[head] + place, 0)]
        newest = length - 1
        return head, torch.where(in_column, column, newest - (newest - (place - own)) % reach)

    def _advance(self, length: Tensor) -> None:
        """Set the state for texts of `length` [B, 1] positions."""
        heads, state = self.index.heads, self.memory.state
        below = torch.nn.functional.pad((self.index.entries < length).cumsum(-1), (1, 0))
        state[:, :, 0] = length
        state[:, :, 1] = below[:, heads.first_column + heads.columns] - below[:, heads.first_column]

    def _check_step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self._check(k, v)
        problem = problem_of_scale(scale)
        require(problem is None, str(problem))
        (batch, heads, _, width), found = k.shape, tuple(q.shape)
        fits = len(found) == 4 and (found[0], *found[2:]) == (batch, 1, width) and found[1] % heads == 0
        require(
            fits and k.shape[2] == v.shape[2] == 1 and (q.dtype, q.device) == (k.dtype, k.device),
            f"a step takes one token, q [{batch}, a multiple of {heads}, 1, {width}] in {k.dtype} on {k.device}, "
            f"got q {found} in {q.dtype} on {q.device}, k {tuple(k.shape)}, v {tuple(v.shape)}",
        )

    def _check(self, k: Tensor, v: Tensor) -> None:
        for given, stored, name in ((k, self.memory.key, "keys"), (v, self.memory.value, "values")):
            expected = (len(stored), self.memory.state.shape[1], stored.shape[-1])
            found = (given.shape[0], given.shape[1], given.shape[3])
            require(
                found == expected and given.dtype == stored.dtype and given.device == stored.device,
                f"the cache stores {name} [batch, KV heads, width] {expected} in {stored.dtype} on {stored.device}, "
                f"got {found} in {given.dtype} on {given.device}: use a new cache",
            )
