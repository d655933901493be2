"""Fingerprint: what must agree between a model and an artefact made for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from attnsieve.errors import UserError, require


@dataclass(frozen=True)
class Fingerprint:
    """Attention geometry of a model. `config_hash`: 16 hex digits over the attention-relevant configuration."""

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    config_hash: str

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """Raises UserError unless `data` has exactly these fields with the right types and positive sizes."""
        names = {field.name for field in fields(cls)}
        require(
            isinstance(data, dict) and set(data) == names,
            f"a model fingerprint has the fields {sorted(names)}, got {data!r:.200}",
        )
        for name, value in data.items():
            if name in ("model_type", "config_hash"):
                require(isinstance(value, str), f"fingerprint field {name} must be text, got {value!r:.80}")
            else:
                require(
                    type(value) is int and value > 0,
                    f"fingerprint field {name} must be a positive whole number, got {value!r:.80}",
                )
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)

    def check(self, model: Fingerprint) -> None:
        """Raise UserError that lists every field in which the artefact (self) differs from `model`."""
        mine, theirs = asdict(self), asdict(model)
        differences = [
            f"{name}: made for {mine[name]}, the model has {theirs[name]}" for name in mine if mine[name] != theirs[name]
        ]
        if differences:
            raise UserError(
                "this artefact was made for another model (" + "; ".join(differences) + "): profile and fit this model"
            )
