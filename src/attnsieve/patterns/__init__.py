"""Patterns: length-free rules for which keys a query keeps."""

from attnsieve.patterns.base import FOREVER, Atom, BlockRows, Pattern
from attnsieve.patterns.corner import Captured
from attnsieve.patterns.text import (
    antidiagonal_blocks,
    columns,
    dam_online,
    dense,
    diagonals,
    dilated,
    empty,
    pooled_blocks,
    probed_blocks,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    window,
)

__all__ = [
    "FOREVER",
    "Atom",
    "BlockRows",
    "Captured",
    "Pattern",
    "antidiagonal_blocks",
    "columns",
    "dam_online",
    "dense",
    "diagonals",
    "dilated",
    "empty",
    "pooled_blocks",
    "probed_blocks",
    "random_blocks",
    "sink",
    "top_blocks",
    "vertical_slash",
    "window",
]
