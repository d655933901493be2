"""Streaming sums over attention probabilities: mean maps below the pattern capture length, O(n) masses beyond it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnsieve.errors import require

# Scores, probabilities, and the flipped and the sheared copy that offset sums are read from.
CHUNK_COPIES = 4


def probabilities(
    q: Tensor, k: Tensor, scale: float, rows: range, *, window: int | None = None, chunk_bytes: int
) -> Iterator[tuple[int, Tensor]]:
    """Causal softmax of one document, a few rows at a time.

    q [Hq, T, D], k [Hkv, T, D]; query head h reads KV head h // (Hq // Hkv), K is not expanded. Yields (first row,
    probabilities [Hq, r, first row + r]) for consecutive pieces of `rows`, in float32 (float64 for float64 inputs), each
    small enough that it and its copies take about `chunk_bytes`.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    (heads, _, width), kv_heads = q.shape, k.shape[0]
    step = max(1, chunk_bytes // (CHUNK_COPIES * heads * rows.stop * work.itemsize))
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        queries = q[:, first:last].to(work).reshape(kv_heads, -1, width)
        scores = (queries @ k[:, :last].to(work).mT).mul_(scale).view(heads, last - first, last)
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(last, device=q.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        yield first, scores.masked_fill_(hidden, -torch.inf).softmax(-1)


def offset_sums(p: Tensor) -> Tensor:
    """[H, keys]: probabilities summed by distance i - j, for p [H, r, keys] whose last row is position keys - 1."""
    heads, rows, keys = p.shape
    # Both axes reversed, distance d of row b lies in column b + d: a view with strides (width + 1, 1) lines distances up.
    mirrored = pad(p.flip((1, 2)), (0, rows))
    width = keys + rows
    return mirrored.as_strided((heads, rows, keys), (rows * width, width + 1, 1)).sum(1)


class MapSums:
    """Sums of probabilities per (layer, query head, i, j) below `pcl`: A and C of arXiv 2506.11104, section 4.2.

    sums: float32 [layers, heads, pcl, pcl]. counts: int64 [layers, pcl], documents that reached row i.
    """

    def __init__(self, layers: int, heads: int, pcl: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(layers, heads, pcl, pcl, device=device)
        self.counts = torch.zeros(layers, pcl, dtype=torch.int64)

    def add(self, layer: int, first: int, p: Tensor) -> None:
        """Add rows first .. first + r - 1 of one document; p [heads, r, first + r]."""
        last = p.shape[2]
        self.sums[layer, :, first:last, :last] += p.to(self.sums.device, self.sums.dtype)
        self.counts[layer, first:last] += 1

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean maps, float32 [layers, heads, pcl, pcl], and rows seen, int64 [pcl]. Uses up the sums.

        Raises UserError if a row was never seen or if layers saw different documents.
        """
        rows_seen = _agreed(self.counts, "capture length")
        return self.sums.div_(rows_seen.clamp_min(1).to(self.sums.device)[:, None]).cpu(), rows_seen


class LongSums:
    """Mass per key column and per distance, summed over rows start .. length - 1 of documents of at least `length` tokens.

    column_mass, offset_mass: float64 [layers, heads, length]. counts: int64 [layers, length - start]. Raises UserError for a length
    below start + 1.
    """

    def __init__(self, layers: int, heads: int, start: int, length: int) -> None:
        require(length > start, f"a probed length must exceed the capture length {start}, got {length}")
        self.start, self.length = start, length
        self.column_mass = torch.zeros(layers, heads, length, dtype=torch.float64)
        self.offset_mass = torch.zeros(layers, heads, length, dtype=torch.float64)
        self.counts = torch.zeros(layers, length - start, dtype=torch.int64)

    def add(self, layer: int, first: int, p: Tensor) -> None:
        """Add rows first .. first + r - 1 of one document; p [heads, r, first + r]. Rows from `length` on are left out."""
        last = min(p.shape[2], self.length)
        if first >= last:
            return
        p = p[:, : last - first, :last]
        self.column_mass[layer, :, :last] += p.sum(1).cpu()
        self.offset_mass[layer, :, :last] += offset_sums(p).cpu()
        self.counts[layer, first - self.start : last - self.start] += 1

    def rows(self) -> int:
        """Rows that were summed, the same for every layer; their masses add up to this. Raises UserError as `means` does."""
        return int(_agreed(self.counts, f"length {self.length}").sum())


def _agreed(counts: Tensor, what: str) -> Tensor:
    missing = (counts.sum(1) == 0).nonzero().flatten().tolist()
    require(
        len(missing) < len(counts),
        f"no document is long enough for {what}: give longer documents or a smaller capture length and shorter probed lengths",
    )
    require(
        not missing,
        f"of those with attention, layers {missing[:8]} added no rows: its attention function is not called",
    )
    require(bool((counts == counts[:1]).all()), "layers saw different rows: the capture was interrupted inside a forward pass")
    unseen = (counts[0] == 0).nonzero().flatten()
    require(
        len(unseen) == 0,
        f"no document reaches the last {len(unseen)} rows of {what}: give longer documents or a smaller capture length",
    )
    return counts[0]
