"""Tile shapes: what a program holds, and the compile-time constants that follow from a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from attnsieve.backends.call import Call
from attnsieve.backends.triton.schedule import Schedule
from attnsieve.device import padded


@dataclass(frozen=True)
class Tiles:
    """rows x keys scores per program, in `warps` warps and with `stages` tiles of keys in flight.

    registers: the most a thread may use, so that more programs fit on a multiprocessor; None leaves it to the compiler.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


class Shape(NamedTuple):
    """What kernels that go through the lists of a schedule are specialised on: H layout heads, of each sequence (OWN_MASKS) or of all;
    G query heads of a KV head; rows of a program, GP heads of M positions each; N keys of a tile; widths of keys and values, padded
    too; which keys may be in lists and the side of whole blocks, see `Schedule`; how many tiles of keys are in flight.
    (Kernels take it as one constant. Before a number goes into a list, and a word to a function, they make it one of its own.)
    """

    H: Any
    OWN_MASKS: Any
    G: Any
    GP: Any
    M: Any
    N: Any
    D: Any
    DP: Any
    DV: Any
    DVP: Any
    PRECISION: Any
    LISTED: Any
    BLOCK: Any
    STAGES: Any


@dataclass(frozen=True)
class Geometry:
    """How the heads and positions of a call fill the rows of a program.

    Where the heads of a KV group share a mask they are packed into the rows of one program, so that keys and values are read
    once for all of them; else a program serves one query head.
    """

    call: Call
    tiles: Tiles

    @cached_property
    def packed(self) -> int:
        """Query heads in a program, padded to a power of two."""
        shared = self.call.layout.heads == self.call.k.shape[1]
        return _power_of_2(self.call.group) if shared else 1

    @cached_property
    def rows(self) -> int:
        return max(self.tiles.rows, self.packed)

    @cached_property
    def positions(self) -> int:
        """Positions of a query tile."""
        return self.rows // self.packed

    @property
    def query_tiles(self) -> int:
        """The most query tiles that a sequence's queries can touch."""
        return -(-self.call.q.shape[2] // self.positions) + 1

    @property
    def total(self) -> int:
        """Query tiles of all layout heads and sequences."""
        return self.query_tiles * self.call.layout.heads * len(self.call.spans)

    def constants(self) -> dict[str, Any]:
        """What every kernel is specialised on."""
        call, width, v_width = self.call, self.call.q.shape[-1], self.call.v.shape[-1]
        return {
            "H": call.layout.heads,
            "OWN_MASKS": call.layout.sequences > 1,
            "G": call.group,
            "GP": self.packed,
            "M": self.positions,
            "N": self.tiles.keys,
            "D": width,
            "DP": padded(width),
            "DV": v_width,
            "DVP": padded_value(v_width),
            # float32 inputs are multiplied in float32, not in tf32.
            "PRECISION": "ieee" if call.q.dtype == torch.float32 else "tf32",
        }

    def shape(self, built: Schedule) -> Shape:
        """`constants`, and what kernels that go through the lists of a schedule are specialised on besides."""
        return Shape(**self.constants(), LISTED=built.listed, BLOCK=built.block, STAGES=self.tiles.stages)

    def options(self) -> dict[str, Any]:
        """How to compile."""
        return {"num_warps": self.tiles.warps, "maxnreg": self.tiles.registers}


def rounding(call: Call) -> dict[str, bool]:
    """How to compile kernels that subtract a row's greatest score, rounded, from scores. A bias can make those so large that a product
    which is not rounded before the subtraction is off by more than exponentials hold: outputs of 0, NaN, or other keys' values.
    Gradients bound their weights instead (`product_columns.at_most_0`)."""
    return {} if call.key_bias is None else {"enable_fp_fusion": False}


def padded_value(v_width: int) -> int:
    """`padded`, but 64 instead of 32: Triton 3.6 multiplies by [keys, 32] tiles wrongly in loops without pipelining."""
    return 64 if padded(v_width) == 32 else padded(v_width)


def _power_of_2(least: int) -> int:
    """The next power of two; Triton's own function takes microseconds."""
    return 1 << (least - 1).bit_length()
