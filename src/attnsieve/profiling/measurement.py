"""Measurement: what candidate patterns keep and cost, measured per layer, head and length on text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnsieve.artefact import Artefact, Expected, plain_json
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Pattern

MAX_CANDIDATES = 4096
NAMES = ("density", "retained", "error")


@dataclass(frozen=True, eq=False, repr=False)
class Measurement(Artefact):
    """Candidates against dense attention, float32 [lengths, candidates, layers, heads] each.

    density: kept over causal pairs. retained: mean share of a row's attention mass that is kept. error: squared difference of
    the head's output from its dense output, summed over rows, over the squared dense outputs of all heads of the layer; the
    errors of a layer's heads add up. All are means over documents of that length. candidates: text of patterns that need no
    captured bits. provenance: JSON. Raises UserError for shapes or values that cannot be such measurements.
    """

    fingerprint: Fingerprint
    candidates: tuple[str, ...]
    lengths: tuple[int, ...]
    density: Tensor
    retained: Tensor
    error: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "measurement"

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", plain_json(self.provenance, "a measurement's provenance"))
        for text in self.candidates:
            Pattern.parse(text)
        require(
            bool(self.lengths) and list(self.lengths) == sorted(set(self.lengths)), f"lengths must ascend, got {self.lengths}"
        )
        shape = (len(self.lengths), len(self.candidates), self.fingerprint.layers, self.fingerprint.heads)
        for name in NAMES:
            values: Tensor = getattr(self, name)
            good = values.dtype == torch.float32 and values.shape == shape
            require(good, f"{name} must be float32 {shape}, got {values.dtype} {tuple(values.shape)}")
            require(bool((values >= 0).all()) and bool(values.isfinite().all()), f"{name} must be finite and not negative")
        # Older versions counted layers without attention, and budgets would be spent on what costs nothing.
        bare = sorted({place[2] for place in (self.density == 0).all(1, keepdim=True).nonzero().tolist()})
        require(not bare, f"no candidate keeps anything in layers {bare[:8]}, not even dense(): measure this model again")

    def __str__(self) -> str:
        model = self.fingerprint
        head = f"measurement of {model.model_type}: {model.layers} layers x {model.heads} heads at lengths {list(self.lengths)}"
        rows = [
            f"{text}: density {self.density[:, c].mean():.3f}, retained {self.retained[:, c].mean():.3f}"
            for c, text in enumerate(self.candidates)
        ]
        return "\n".join([head, *rows])

    def to_config(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "candidates": list(self.candidates),
            "lengths": list(self.lengths),
            "provenance": self.provenance,
        }

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def expected(cls, config: dict[str, Any]) -> dict[str, Expected]:
        fields = {"fingerprint", "candidates", "lengths", "provenance"}
        require(config.keys() == fields, f"a measurement's config.json has the fields {sorted(fields)}, got {sorted(config)}")
        model, candidates, lengths = Fingerprint.from_json(config["fingerprint"]), config["candidates"], config["lengths"]
        texts = isinstance(candidates, list) and 0 < len(candidates) <= MAX_CANDIDATES
        require(texts and all(isinstance(text, str) for text in candidates), "candidates must be a list of pattern texts")
        require(isinstance(lengths, list) and all(type(n) is int and n > 0 for n in lengths), "lengths must be whole numbers")
        require(isinstance(config["provenance"], dict), "provenance must be an object")
        shape = (len(lengths), len(candidates), model.layers, model.heads)
        return {name: Expected("F32", shape) for name in NAMES}

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        fingerprint = Fingerprint.from_json(config["fingerprint"])
        density, retained, error = (tensors[name] for name in NAMES)
        texts, lengths = tuple(config["candidates"]), tuple(config["lengths"])
        return cls(fingerprint, texts, lengths, density, retained, error, config["provenance"])
