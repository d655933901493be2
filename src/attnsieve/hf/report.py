"""Reports: what ran sparse, what stayed dense, and why; what a cache stores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PHASES = ("prefill", "chunk", "decode")
BY_PLAN = "by plan: every head of the layer is dense()"
FASTER = 'faster dense: backend "fastest" expects dense attention to take less time than the plan at this length'


@dataclass(frozen=True)
class LayerReport:
    """Attention calls of one layer. sparse: by phase (prefill, chunk, decode); dense: by reason; backends: who computed the
    sparse ones."""

    layer: int
    sparse_heads: int
    sparse: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Report:
    """What a handle has seen so far, layer by layer."""

    layers: tuple[LayerReport, ...]

    @property
    def sparse_calls(self) -> int:
        """Calls that ran sparse."""
        return sum(layer.sparse.total() for layer in self.layers)

    @property
    def unplanned(self) -> dict[str, int]:
        """Calls that stayed dense although the plan is sparse there, by reason."""
        reasons: Counter[str] = sum((layer.dense for layer in self.layers), Counter())
        return {reason: count for reason, count in reasons.most_common() if reason != BY_PLAN}

    def to_json(self) -> dict[str, Any]:
        """Plain data for programs."""
        layers = [
            {
                "layer": layer.layer,
                "sparse_heads": layer.sparse_heads,
                "sparse": dict(layer.sparse),
                "dense": dict(layer.dense),
                "backends": dict(layer.backends),
            }
            for layer in self.layers
        ]
        return {"sparse_calls": self.sparse_calls, "unplanned_dense_calls": self.unplanned, "layers": layers}

    def __str__(self) -> str:
        phases: Counter[str] = sum((layer.sparse for layer in self.layers), Counter())
        ran = ", ".join(f"{phases[phase]} {phase}" for phase in PHASES if phases[phase]) or "none"
        backends: Counter[str] = sum((layer.backends for layer in self.layers), Counter())
        by = f" (by {', '.join(f'{name} {count}' for name, count in backends.most_common())})" if backends else ""
        lines = [f"attention calls that ran sparse: {ran}{by}"]
        dense: dict[str, list[int]] = {}
        for layer in self.layers:
            for reason in layer.dense:
                dense.setdefault(reason, []).append(layer.layer)
        return "\n".join(lines + [f"dense in layers {layers}: {reason}" for reason, layers in dense.items()])


@dataclass(frozen=True)
class LayerMemory:
    """What one layer stores. share: of a dense cache for max_length tokens, when full. whole: why it keeps all keys, or None."""

    layer: int
    share: float
    nbytes: int
    whole: str | None


@dataclass(frozen=True)
class CacheReport:
    """Memory of a `SparseCache`. index_bytes: vectors shared by the layers that say where keys lie."""

    layers: tuple[LayerMemory, ...]
    index_bytes: int
    max_length: int

    @property
    def share(self) -> float:
        """Keys that the layers store when full, over those of a dense cache for as many tokens."""
        return sum(layer.share for layer in self.layers) / len(self.layers)

    @property
    def nbytes(self) -> int:
        return self.index_bytes + sum(layer.nbytes for layer in self.layers)

    def __str__(self) -> str:
        lines = [
            f"cache for {self.max_length} tokens: {self.share:.1%} of a dense one, now {self.nbytes / 2**20:.1f} MiB "
            f"({self.index_bytes / 2**20:.1f} MiB of it say where keys lie)"
        ]
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            kept = f"all keys ({layer.whole})" if layer.whole else f"{layer.share:.1%} of the keys"
            alike.setdefault(f"{kept}, {layer.nbytes / 2**20:.1f} MiB each", []).append(layer.layer)
        return "\n".join(lines + [f"layers {layers}: {text}" for text, layers in alike.items()])
