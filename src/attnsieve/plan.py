"""Plan: which pattern every query head of every layer uses, and where that choice came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from attnsieve.artefact import Artefact, Expected, plain_json
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern
from attnsieve.patterns.corner import pack_bits, unpack_bits
from attnsieve.patterns.dynamic import DenseDecode, DensePrefill, LastQueries

MAX_HEADS = 1 << 20
MAX_CORNER = 1 << 16


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Artefact):
    """layers x query heads -> Pattern for the model that `fingerprint` names.

    patterns: tuple of the layers with attention, each a tuple of one Pattern per query head. provenance: JSON, how the plan came about.
    density, retained: fp32 [layers, heads] or None, the expected share of causal pairs kept and of attention mass kept, at
    the length that provenance names.

    Raises UserError for counts that do not match the fingerprint, for what is no Pattern, and for a head that keeps no key in any row
    of prompts or of decode steps.
    """

    fingerprint: Fingerprint
    patterns: tuple[tuple[Pattern, ...], ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    density: Tensor | None = None
    retained: Tensor | None = None
    kind: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        _check_fingerprint(self.fingerprint)
        object.__setattr__(self, "patterns", tuple(tuple(row) for row in self.patterns))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "a plan's provenance"))
        layers, heads = self.fingerprint.layers, self.fingerprint.heads
        rows = [len(row) for row in self.patterns]
        require(
            rows == [heads] * layers,
            f"a plan for this model needs {layers} rows of {heads} patterns, one for each layer with attention "
            f"({self.fingerprint.listed()}), got {len(rows)} rows of {sorted(set(rows))}",
        )
        strange = [entry for row in self.patterns for entry in row if not isinstance(entry, Pattern)]
        require(not strange, f"a plan holds Pattern objects, got {strange[:1]!r:.80}: use Pattern.parse for text")
        numbered = zip(self.fingerprint.indices, self.patterns, strict=True)
        silent = [f"L{layer}H{head}" for layer, row in numbered for head in range(heads) if _silent(row[head])]
        require(
            not silent,
            f"{len(silent)} heads keep no key in any row ({', '.join(silent[:8])}) of prompts or of decode steps, where their output "
            "would be 0: lower the threshold, join another pattern, or use dense() for them",
        )
        for name in ("density", "retained"):
            _check_share(name, getattr(self, name), (layers, heads))

    @classmethod
    def uniform(cls, fingerprint: Fingerprint, pattern: Pattern | str) -> Self:
        """The same pattern, given as such or as text, for every head."""
        _check_fingerprint(fingerprint)
        rule = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        rows = ((rule,) * fingerprint.heads,) * fingerprint.layers
        return cls(fingerprint, rows, {"method": "uniform"})

    @property
    def dynamic(self) -> bool:
        """Whether any head chooses its keys from the input."""
        return any(pattern.dynamic for row in self.patterns for pattern in row)

    def row(self, layer: int) -> tuple[Pattern, ...]:
        """The patterns of the model's layer `layer`, one per query head. Raises UserError for a layer without attention."""
        return self.patterns[self.fingerprint.row(layer)]

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise UserError that lists the differences unless the plan was made for the model of `fingerprint`.

        Plans of older versions have rows for layers without attention too, which nothing reads.
        """
        own = self.fingerprint
        if set(fingerprint.indices) < set(own.indices):
            own = replace(own, layers=fingerprint.layers, indices=fingerprint.indices)
        own.check(fingerprint)

    def __str__(self) -> str:
        model = self.fingerprint
        lines = [f"plan for {model.model_type}: {model.layers} layers x {model.heads} heads, {_origin(self.provenance)}"]
        for name, share in (("density", self.density), ("retained mass", self.retained)):
            if share is not None:
                lines.append(f"{name}: mean {share.mean():.3f}, least {share.min():.3f}, most {share.max():.3f}")
        common = Counter(outline(pattern) for row in self.patterns for pattern in row).most_common()
        lines += [f"{count:5d} heads  {shape}" for shape, count in common[:12]]
        if len(common) > 12:
            lines.append(f"{sum(count for _, count in common[12:]):5d} heads  in {len(common) - 12} other forms")
        return "\n".join(lines)

    def to_config(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "provenance": self.provenance,
            "corners": {atom.digest: atom.length for atom in self._captured()},
            "statistics": [name for name in ("density", "retained") if getattr(self, name) is not None],
            "patterns": [[str(pattern) for pattern in row] for row in self.patterns],
        }

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {f"corner.{atom.digest}": torch.from_numpy(atom.bits) for atom in self._captured()}
        shares = {"density": self.density, "retained": self.retained}
        return tensors | {name: share for name, share in shares.items() if share is not None}

    @classmethod
    def expected(cls, config: dict[str, Any]) -> dict[str, Expected]:
        fields = {"fingerprint", "provenance", "corners", "statistics", "patterns"}
        require(config.keys() == fields, f"a plan's config.json has the fields {sorted(fields)}, got {sorted(config)}")
        model = Fingerprint.from_json(config["fingerprint"])
        require(model.layers * model.heads <= MAX_HEADS, f"a plan has at most {MAX_HEADS} heads")
        statistics = config["statistics"]
        require(statistics in ([], ["density"], ["retained"], ["density", "retained"]), "unknown statistics in config.json")
        tensors = {name: Expected("F32", (model.layers, model.heads)) for name in statistics}
        require(isinstance(config["corners"], dict), "corners in config.json must map digests to lengths")
        for digest, length in config["corners"].items():
            good = type(length) is int and 0 < length <= MAX_CORNER
            require(good, f"a corner's length must be from 1 to {MAX_CORNER}, got {length!r:.40}")
            tensors[f"corner.{digest}"] = Expected("U8", (length, -(-length // 8)))
        return tensors

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        corners = {digest: _causal(tensors[f"corner.{digest}"].numpy(), digest) for digest in config["corners"]}
        rows = config["patterns"]
        good = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        require(good and isinstance(config["provenance"], dict), "patterns must be a list of lists and provenance an object")
        patterns = tuple(tuple(_parse(text, corners) for text in row) for row in rows)
        fingerprint = Fingerprint.from_json(config["fingerprint"])
        plan = cls(fingerprint, patterns, config["provenance"], tensors.get("density"), tensors.get("retained"))
        unused = corners.keys() - {atom.digest for atom in plan._captured()}
        require(not unused, f"captured bits {sorted(unused)[:3]} belong to no pattern")
        return plan

    def _captured(self) -> list[Captured]:
        """Every captured atom once, by digest."""
        found = {
            atom.digest: atom for row in self.patterns for pattern in row for atom in pattern if isinstance(atom, Captured)
        }
        return [found[digest] for digest in sorted(found)]


def _parse(text: Any, corners: dict[str, np.ndarray]) -> Pattern:
    require(isinstance(text, str), f"a pattern must be text, got {text!r:.80}")
    return Pattern.parse(text, corners)


def _causal(bits: np.ndarray, digest: str) -> np.ndarray:
    length = len(bits)
    clean = pack_bits(np.tril(unpack_bits(bits, length)))
    require(np.array_equal(bits, clean), f"captured bits {digest} keep keys after their query")
    return bits


def _silent(pattern: Pattern) -> bool:
    """Whether a pattern keeps nothing in any row, of prompts or of decode steps."""
    atoms = [atom for atom in pattern if not isinstance(atom, Captured) or atom.bits.any()]
    return any(all(isinstance(atom, others) for atom in atoms) for others in (DenseDecode, (DensePrefill, LastQueries)))


def _check_fingerprint(given: object) -> None:
    good = isinstance(given, Fingerprint)
    require(good, f"a plan is made for a Fingerprint, got {type(given).__name__}: attnsieve.hf.fingerprint(model) is a model's")


def _check_share(name: str, share: Tensor | None, shape: tuple[int, int]) -> None:
    if share is None:
        return
    good = share.dtype == torch.float32 and share.shape == shape
    require(good, f"{name} must be float32 {shape}, got {share.dtype} {tuple(share.shape)}")
    inside = bool(((share >= 0) & (share <= 1)).all())
    require(inside, f"{name} must lie in 0 .. 1")


def _origin(provenance: dict[str, Any]) -> str:
    named = [f"{key} {provenance[key]}" for key in ("method", "preset", "pcl") if key in provenance]
    return ", ".join(named) or "made by hand"


def outline(pattern: Pattern) -> str:
    """A pattern's text with long lists counted and digests left out, so that like heads are counted together."""
    parts = []
    for atom in pattern:
        positional, _ = atom.arguments()
        if isinstance(atom, Captured):
            parts.append(f"captured({atom.length})")
        else:
            parts.append(f"{atom.name}(...)" if len(positional) > 4 else str(atom))
    return " | ".join(parts) or "empty()"
