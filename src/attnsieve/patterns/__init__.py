"""Patterns: length-free rules for which keys a query keeps."""

from attnsieve.patterns.base import FOREVER, Atom, BlockRows, Pattern
from attnsieve.patterns.corner import Captured
from attnsieve.patterns.text import columns, dense, diagonals, dilated, empty, random_blocks, sink, window

__all__ = [
    "FOREVER",
    "Atom",
    "BlockRows",
    "Captured",
    "Pattern",
    "columns",
    "dense",
    "diagonals",
    "dilated",
    "empty",
    "random_blocks",
    "sink",
    "window",
]
