"""Fingerprint: what must agree between a model and an artefact made for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from attnsieve.errors import require


@dataclass(frozen=True)
class Fingerprint:
    """Attention geometry of a model. `config_hash`: 16 hex digits over the attention-relevant configuration.

    layers: those with attention, which artefacts have a row each for. indices: the model's own number of each, ascending; by
    default 0 to layers - 1. Hybrids have convolutions or recurrent states in the layers between.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    config_hash: str
    indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        given, every = tuple(self.indices), range(self.layers)
        numbers = all(type(index) is int and index >= 0 for index in given)
        require(
            not given or (numbers and len(given) == self.layers and list(given) == sorted(set(given))),
            f"the indices of {self.layers} layers must be as many whole numbers that ascend, got {given!r:.200}: make the artefact "
            "of this model again",
        )
        # A range takes no memory, whatever number of layers a file claims.
        object.__setattr__(self, "indices", every if not given or given[-1] == len(given) - 1 else given)

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """Raises UserError unless `data` has exactly these fields with the right types and positive sizes."""
        names = {field.name for field in fields(cls)}
        require(
            isinstance(data, dict) and set(data) | {"indices"} == names,
            f"a model fingerprint has the fields {sorted(names)}, got {data!r:.200}",
        )
        for name, value in data.items():
            if name in ("model_type", "config_hash"):
                require(isinstance(value, str), f"fingerprint field {name} must be text, got {value!r:.80}")
            elif name == "indices":
                require(
                    isinstance(value, list) and bool(value),
                    f"fingerprint field {name} must list layers, got {value!r:.80}: make the artefact of this model again",
                )
            else:
                require(
                    type(value) is int and value > 0,
                    f"fingerprint field {name} must be a positive whole number, got {value!r:.80}",
                )
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain dictionary; indices only where they say something, as in artefacts of older versions."""
        data = asdict(self)
        indices = data.pop("indices")
        return data if isinstance(indices, range) else data | {"indices": list(indices)}

    def row(self, layer: int) -> int:
        """Where artefacts keep the model's layer `layer`. Raises UserError for layers that do not exist or have no attention."""
        require(layer in self.indices, f"the model has no attention in layer {layer}; it has in {self.listed()}")
        return self.indices.index(layer)

    def listed(self) -> str:
        """The layers with attention in words."""
        first, last = self.indices[0], self.indices[-1]
        together = last - first == self.layers - 1
        return f"layers {first} to {last}" if together else f"layers {', '.join(map(str, self.indices))}"

    def check(self, model: Fingerprint) -> None:
        """Raise UserError that lists every field in which the artefact (self) differs from `model`."""
        differences = [f"{name}: made for {mine}, the model has {theirs}" for name, mine, theirs in self._differences(model)]
        require(
            not differences, f"this artefact was made for another model ({'; '.join(differences)}): profile and fit this model"
        )

    def check_same(self, other: Fingerprint, mine: str, theirs: str) -> None:
        """Raise UserError that lists every difference unless two artefacts are of one model. `mine` and `theirs` name them, as in
        "the plan" and "the profile"."""
        differences = [f"{name}: {one} and {two}" for name, one, two in self._differences(other)]
        require(
            not differences,
            f"{mine} and {theirs} were made for different models ({'; '.join(differences)}): give those of one model",
        )

    def _differences(self, other: Fingerprint) -> list[tuple[str, Any, Any]]:
        """Name, own value and the other's of every field that differs."""
        hybrid = not (isinstance(self.indices, range) and isinstance(other.indices, range))
        mine, theirs = self._told(hybrid), other._told(hybrid)
        return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]

    def _told(self, hybrid: bool) -> dict[str, Any]:
        """The fields by name. How many layers have attention says little of hybrids, so it is told which."""
        data = asdict(self)
        del data["indices"]
        if hybrid:
            del data["layers"]
            data["layers with attention"] = self.listed().removeprefix("layers ")
        return data
