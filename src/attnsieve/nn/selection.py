"""Which keys a row keeps: scores to one `end` per key, exactly and in parallel.

A row keeps the w best keys of its prefix (arXiv 2508.02124, Listing 1). "Better" is a strict order, larger score first and
the more recent key first among equals, so a key that has left never returns: key j is kept by the rows j <= i < end[j].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.errors import NotFiniteError, require
from attnsieve.nn.fused import fused_ends
from attnsieve.nn.quantile import kth_position
from attnsieve.nn.segments import Segments

# Sums of them and of slots are int32.
_MOST = 2**29


@dataclass(frozen=True)
class SelectionRule:
    """The `keep_window_size` best keys of the prefix, plus optionally the newest `window` keys and the first `sinks` keys.

    A key competes for the budget when it leaves the window, so a row keeps min(i + 1, keep_window_size + window) keys and
    the window costs no budget. `union=True`: keys compete from the start and the window is joined to the winners. Sinks
    are joined too; they compete like any key.

    Without a window, as in Doge, no key is sure to be kept, not even the row's own: language models trained so learn little of
    what stands next to a token (docs/LOG.md).
    """

    keep_window_size: int
    window: int = 0
    sinks: int = 0
    union: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_window_size", 1), ("window", 0), ("sinks", 0)):
            value = getattr(self, name)
            good = type(value) is int and least <= value <= _MOST
            require(good, f"{name} must be a whole number of at least {least} (and at most 2^29), got {value!r}")

    @property
    def slots(self) -> int:
        """The most keys a row can keep."""
        return self.keep_window_size + self.window + self.sinks

    def ends(self, sigma: Tensor, segments: Segments | None = None, *, check_nan: bool | None = None) -> Tensor:
        """int32 [B, H, n]: the first row that no longer keeps each key, in slots; a padding slot gets its own index.

        sigma: floating point [B, H, n], compared in float32. A NaN score raises UserError. Looking for one reads the
        device, so by default (`check_nan=None`) only CPU scores are checked; elsewhere NaN ranks above every number: the
        key stays to the end of its document and its NaN bias reaches every later output.
        """
        _check(sigma, segments, check_nan)
        if sigma.is_cuda:
            return fused_ends(sigma, segments, self.keep_window_size, self.window, self.sinks, self.union)
        return self.widen(competition_ends(sigma, self.keep_window_size, segments), segments)

    def widen(self, ends: Tensor, segments: Segments | None = None) -> Tensor:
        """`ends` of the competition alone, int32 [B, H, n], with window and sinks added."""
        if not self.window and not self.sinks:
            return ends
        segments = segments or Segments.whole(ends.shape[0], ends.shape[-1], ends.device)
        start, stop = segments.start[:, None], segments.stop[:, None]
        index = torch.arange(ends.shape[-1], dtype=torch.int32, device=ends.device)
        if self.window:
            longer = torch.maximum(ends, index + self.window) if self.union else ends + self.window
            ends = torch.minimum(longer, stop)
        if self.sinks:
            ends = torch.where(index - start < self.sinks, stop, ends)
        return ends


def competition_ends(sigma: Tensor, budget: int, segments: Segments | None = None) -> Tensor:
    """int32 [B, H, n]: the first row whose `budget` best keys no longer include each key; itself if never admitted.

    The budget-th smallest position among the keys better than j is the row that drops j. Documents are solved together: in
    the order by (document, best first) the keys of earlier documents are those at smaller positions, so they only shift k.
    Kernels for a GPU find the same without sorting.
    """
    if sigma.is_cuda:
        return fused_ends(sigma, segments, budget)
    batch, heads, n = sigma.shape
    order = best_first(sigma, segments)
    segments = segments or Segments.whole(batch, n, sigma.device)
    # Sorted by document, rank r lies in the document of slot r: its start and stop need no gather.
    start, stop = segments.start[:, None].expand(-1, heads, -1), segments.stop[:, None]
    leaving = kth_position(order.to(torch.int32).flatten(0, 1), (start + (budget - 1)).flatten(0, 1)).view(batch, heads, n)
    rank = torch.arange(n, dtype=torch.int32, device=sigma.device) - start
    ends = torch.maximum(order.to(torch.int32), torch.where(rank < budget, stop, leaving))
    return torch.empty_like(ends).scatter_(-1, order, ends)


def best_first(sigma: Tensor, segments: Segments | None = None) -> Tensor:
    """int64 [B, H, n]: slots ordered by document, then larger score first, then more recent first."""
    # A stable sort of the reversed row puts the more recent of equal keys first, so 32 bits are enough for one document.
    key = (~ordinal(sigma)).flip(-1)
    if segments is not None:
        key = (segments.start[:, None].flip(-1).long() << 32) + key
    return sigma.shape[-1] - 1 - key.sort(dim=-1, stable=True).indices


def strict_key(sigma: Tensor, position: Tensor) -> Tensor:
    """int64: the strict order as one number; `position` is an integer in [0, 2^32)."""
    return (ordinal(sigma).long() << 32) + position


def ordinal(sigma: Tensor) -> Tensor:
    """int32 in the order of float32(sigma); -0.0 equals 0.0, NaN is above every number."""
    ordered = _flip_negatives((sigma.float() + 0.0).view(torch.int32))
    return ordered.masked_fill(sigma.isnan(), 0x7FFFFFFF)


def score_of(key: Tensor) -> Tensor:
    """float32: the score that `strict_key` packed."""
    return _flip_negatives((key >> 32).to(torch.int32)).view(torch.float32)


def _flip_negatives(bits: Tensor) -> Tensor:
    """float32 bits read as int32 to integers in the same order, and back: the order of negative floats is reversed."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _check(sigma: Tensor, segments: Segments | None, check_nan: bool | None) -> None:
    shape = tuple(sigma.shape)
    require(
        sigma.ndim == 3 and sigma.is_floating_point(), f"scores must be floating point [B, H, n], got {sigma.dtype} {shape}"
    )
    if segments is not None:
        expected = (shape[0], shape[2])
        require(segments.start.shape == expected, f"segments must cover {expected}, got {tuple(segments.start.shape)}")
    if check_nan is None:
        check_nan = sigma.device.type == "cpu" and not torch.compiler.is_compiling()
    if check_nan:
        bad = sigma.isnan() if segments is None else sigma.isnan() & segments.real[:, None]
        if bool(bad.any()):
            raise NotFiniteError("a selection score is NaN", "check the values, dt weights and A (or lower the learning rate)")
