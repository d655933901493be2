"""Capture: the accumulators of all layers, fed from inside a model's attention function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.profiling.memory import check_memory, estimate_memory
from attnsieve.profiling.profile import LongStatistics, Profile
from attnsieve.profiling.statistics import LongSums, MapSums, probabilities

# On a CPU a piece should stay in the caches: 2.7 times faster at 2048 tokens and 9 heads than 256 MiB.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


class Capture:
    """Streaming capture of one model: mean maps below `pcl`, O(n) statistics at each of `lengths` beyond it.

    device: where the map sums live. chunk_bytes: memory for one piece of one layer's probabilities, by default what its device
    is fast at. memory_limit: bytes the sums may take, by default nine tenths of what is free. Raises UserError if they cannot
    fit, or for lengths <= pcl.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        *,
        pcl: int = 512,
        lengths: Sequence[int] = (2048,),
        maps: bool = True,
        device: torch.device | str = "cpu",
        chunk_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        require(pcl >= 1, f"the capture length must be at least 1 token, got {pcl}")
        require(maps or bool(lengths), "nothing to capture: ask for maps or for at least one probed length")
        check_memory(estimate_memory(fingerprint, pcl, lengths, maps=maps), memory_limit, device)
        layers, heads = fingerprint.layers, fingerprint.heads
        self.fingerprint, self.pcl, self.chunk_bytes = fingerprint, pcl, chunk_bytes
        self.longs = [LongSums(layers, heads, pcl, length) for length in sorted(set(lengths))]
        self.maps = MapSums(layers, heads, pcl, device) if maps else None

    @torch.no_grad()
    def add(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        spans: Sequence[tuple[int, int, int]],
        window: int | None = None,
    ) -> None:
        """Add what the model's layer `layer` sees of a batch. q [B, Hq, T, D], k [B, Hkv, T, D]; spans: (batch row, first slot,
        tokens).

        Raises UserError for shapes that do not match the fingerprint and, naming the layer, for NaN or infinite scores.
        """
        self._check(q, k)
        place = self.fingerprint.row(layer)
        chunk_bytes = self.chunk_bytes or CHUNK_BYTES.get(q.device.type, CHUNK_BYTES["cuda"])
        for row, start, tokens in spans:
            queries, keys = q[row, :, start : start + tokens], k[row, :, start : start + tokens]
            require(0 < tokens == queries.shape[1], f"span {(row, start, tokens)} does not fit {q.shape[2]} slots")
            for rows in self._rows(tokens):
                for first, p in probabilities(queries, keys, scale, rows, window=window, chunk_bytes=chunk_bytes):
                    require(
                        bool(p.sum().isfinite()),
                        f"layer {layer} has NaN or infinite attention scores (batch row {row}, from position {first}): "
                        "check the weights, or profile in float32 or bfloat16",
                    )
                    self._add(place, first, p, tokens)

    def finish(self, provenance: dict[str, Any] | None = None) -> Profile:
        """The profile of everything added, whose sums it takes over. Raises UserError if a layer or a row was never seen."""
        maps, rows_seen = (None, None) if self.maps is None else self.maps.means()
        longs = [
            LongStatistics(sums.length, sums.rows(), sums.column_mass.float(), sums.offset_mass.float()) for sums in self.longs
        ]
        return Profile(self.fingerprint, self.pcl, maps, rows_seen, tuple(longs), provenance or {})

    def _rows(self, tokens: int) -> list[range]:
        """The rows of a document that anything is summed over, maps apart from the rest."""
        probed = max((sums.length for sums in self.longs if sums.length <= tokens), default=0)
        maps = range(min(tokens, self.pcl) if self.maps is not None else 0)
        return [rows for rows in (maps, range(self.pcl, probed)) if rows]

    def _add(self, place: int, first: int, p: Tensor, tokens: int) -> None:
        if self.maps is not None and first < self.pcl:
            self.maps.add(place, first, p)
        else:
            for sums in self.longs:
                if sums.length <= tokens:
                    sums.add(place, first, p)

    def _check(self, q: Tensor, k: Tensor) -> None:
        model = self.fingerprint
        # Some layers of a model may have more KV heads than others.
        fits = (
            q.ndim == k.ndim == 4 and q.shape[1] == model.heads and k.shape[1] % model.kv_heads == q.shape[1] % k.shape[1] == 0
        )
        require(
            fits and q.shape[2:] == k.shape[2:],
            f"q and k must be [batch, {model.heads} and {model.kv_heads} heads, slots, width] with equal slots and width, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}: profile without a cache",
        )
