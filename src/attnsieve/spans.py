"""Spans: where the sequences of a batch lie in K/V and in Q."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from attnsieve.errors import UserError, require


@dataclass(frozen=True, eq=False)
class Spans:
    """One entry per sequence; int64 [S] tensors on one device.

    Sequence s lives in batch row `batch[s]`, in key slots [k_start, k_start + k_len) and query slots
    [q_start, q_start + q_len); its queries are the last `q_len` of its `k_len` positions. Slots in no span are padding, no query
    slot is in two.
    Values on a GPU are not read back by kernels, so building spans there costs no synchronisation. `whole` is what the host
    knows without reading: every one of `batch` rows is one sequence, with (batch, queries, keys) of this size.
    """

    batch: Tensor
    q_start: Tensor
    q_len: Tensor
    k_start: Tensor
    k_len: Tensor
    whole: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int, int]], device: torch.device | str = "cpu") -> Spans:
        """From (batch, q_start, q_len, k_start, k_len) rows. Raises UserError for rows of other lengths."""
        require(
            all(len(row) == 5 for row in rows), f"spans are rows of batch, q_start, q_len, k_start, k_len, got {rows!r:.80}"
        )
        table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 5)
        batch, q_start, q_len, k_start, k_len = table.unbind(1)
        return cls(batch, q_start, q_len, k_start, k_len)

    @classmethod
    def full(cls, batch: int, q_len: int, k_len: int, device: torch.device | str = "cpu") -> Spans:
        """Every batch row is one sequence: its keys fill all slots, its queries are the last `q_len` positions."""
        # Made on the device: copying a list there would wait for it. No vector twice: each is a launch.
        first, keys = (torch.full((batch,), value, device=device) for value in (0, k_len))
        queries = keys if q_len == k_len else torch.full_like(keys, q_len)
        row = first if batch == 1 else torch.arange(batch, device=device)
        return cls(row, first, queries, first, keys, whole=(batch, q_len, k_len))

    @classmethod
    def left_padded(cls, pads: Tensor, q_len: int, k_len: int) -> Spans:
        """`pads` int64 [B]: key slots before the first token of each row. `q_len` query slots are the last of `k_len`."""
        keys = k_len - pads
        queries = keys.clamp_max(q_len).clamp_min(0)
        batch = torch.arange(len(pads), device=pads.device)
        return cls(batch, q_len - queries, queries, pads.clamp_max(k_len), keys.clamp_min(0))

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Spans:
        """Documents of these lengths one after the other in batch row 0, each attending to itself only."""
        starts = [sum(lengths[:s]) for s in range(len(lengths))]
        rows = [(0, start, n, start, n) for start, n in zip(starts, lengths, strict=True)]
        return cls.of(rows, device)

    def is_plain_on(self, device: torch.device) -> bool:
        """Whether all vectors are what `full` makes of them on `device`."""
        return self._plain and self.batch.device == device

    @cached_property
    def _plain(self) -> bool:
        device = self.batch.device
        return all(x.dtype == torch.int64 and x.device == device and x.shape == self.batch.shape for x in self._vectors)

    @property
    def _vectors(self) -> tuple[Tensor, ...]:
        return self.batch, self.q_start, self.q_len, self.k_start, self.k_len

    def __len__(self) -> int:
        return len(self.batch)

    def rows(self) -> list[tuple[int, int, int, int, int]]:
        """(batch, q_start, q_len, k_start, k_len) as Python integers; reads the device."""
        table = torch.stack([self.batch, self.q_start, self.q_len, self.k_start, self.k_len], dim=1)
        return [(b, q0, nq, k0, nk) for b, q0, nq, k0, nk in table.tolist()]

    def check_vectors(self) -> None:
        """Raise UserError unless the vectors are int64 [S] on one device. Kernels compute addresses in their dtype. Reads no
        device."""
        tensors = all(isinstance(vector, Tensor) for vector in self._vectors)
        if not (tensors and self._plain):
            found = [f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in self._vectors] if tensors else self._vectors
            raise UserError(
                f"spans are int64 tensors of one entry per sequence on one device, got {found!r:.300}: Spans.of makes them of rows"
            )

    def check(self, batch: int, q_slots: int, k_slots: int, capacity: int) -> None:
        """Raise UserError unless every span lies inside the tensors and the layout, and no two share a query. Reads the device."""
        self.check_vectors()
        rows = self.rows()
        for b, q0, nq, k0, nk in rows:
            inside = 0 <= b < batch and 0 <= q0 <= q0 + nq <= q_slots and 0 <= k0 <= k0 + nk <= k_slots
            require(
                inside and nq <= nk,
                f"span (batch {b}, queries {q0}+{nq}, keys {k0}+{nk}) does not fit {batch} rows of {q_slots} query and "
                f"{k_slots} key slots, with at most as many queries as keys",
            )
            require(
                nk <= capacity, f"a sequence has {nk} positions, the layout is compiled for {capacity}: compile a longer one"
            )
        asked = sorted((b, q0, q0 + nq) for b, q0, nq, _, _ in rows if nq)
        for (b, _, stop), (other, start, _) in pairwise(asked):
            require(
                b != other or stop <= start, f"two spans share query slot {start} of batch row {b}: a query is of one sequence"
            )
