"""Layout: the patterns of one layer compiled to vectors, the only thing a kernel sees."""

from attnsieve.layout.compiling import capacity_for, compile_layout
from attnsieve.layout.settled import settled_layout, settled_row
from attnsieve.layout.vectors import Blocks, Layout

__all__ = ["Blocks", "Layout", "capacity_for", "compile_layout", "settled_layout", "settled_row"]
