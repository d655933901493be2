"""The attention shapes of known models."""

from __future__ import annotations

from dataclasses import dataclass

from attnsieve.errors import require


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer and their width."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 32, 8, 64),
        Shape("llama-3.2-3b", 24, 8, 128),
        Shape("llama-3.1-8b", 32, 8, 128),
        Shape("qwen3-32b", 64, 8, 128),
        Shape("70b-layer", 64, 8, 128),
        Shape("smollm2-135m", 9, 3, 64),
    )
}


def shape_of(name: str) -> Shape:
    """The shape `name`. Raises UserError for an unknown name."""
    require(name in SHAPES, f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    return SHAPES[name]
