"""Dynamic atoms: rules that choose keys from q and k of the input. How each chooses is in `attnsieve.selection`.

Every choice is made per sequence and head from the queries of the current call, so batch mates and padding never matter.
Chunk rule: each chunk chooses anew from its own queries and all keys so far. Decode rule: a decode step is a chunk of one row.
A choice reads whole blocks of queries or the last ones, so within one call it may depend on later queries than the row it is
used for; values never leak, and decode steps are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from attnsieve.errors import UserError, require
from attnsieve.patterns.base import Atom


class DynamicAtom(Atom):
    """A rule that needs q and k; shared checks and spelling."""

    dynamic = True

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        raise UserError(f"{self} chooses its keys from the input: positions alone do not say what it keeps")

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [], {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        require(good, f"{self.name}'s {name} must be above 0 and at most 1, got {value!r}")
        object.__setattr__(self, name, float(value))

    def _check_count(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        require(
            type(value) is int and value >= least, f"{self.name}'s {name} must be a whole number from {least}, got {value!r}"
        )


@dataclass(frozen=True, repr=False)
class VerticalSlash(DynamicAtom):
    """Columns and offsets that hold `mass` of the attention of the last `probe` queries, the fewest of both together.

    `strided` adds that many rows spread over the call to the probe (MInference's pattern with a mass instead of counts).
    """

    mass: float = 0.95
    probe: int = 64
    strided: int = 0
    name = "vertical_slash"

    def __post_init__(self) -> None:
        self._check_share("mass")
        self._check_count("probe")
        self._check_count("strided", 0)


@dataclass(frozen=True, repr=False)
class DamOnline(DynamicAtom):
    """DAM on this input: amplify the probe's attention (Box-Cox), threshold at `tau`, keep columns and offsets whose share of
    kept probe cells reaches `mu` (arXiv 2506.11104, eq. 2-6 on a probe instead of a data set)."""

    tau: float = 0.3
    mu: float = 0.8
    probe: int = 16
    strided: int = 0
    name = "dam_online"

    def __post_init__(self) -> None:
        self._check_share("mu")
        require(
            isinstance(self.tau, (int, float)) and 0 <= self.tau <= 2, f"dam_online's tau must be from 0 to 2, got {self.tau!r}"
        )
        object.__setattr__(self, "tau", float(self.tau))
        self._check_count("probe")
        self._check_count("strided", 0)


@dataclass(frozen=True, repr=False)
class ProbedBlocks(DynamicAtom):
    """Per block of queries, the fewest key blocks that hold `mass` of the exact attention of `rows` of its queries."""

    mass: float = 0.95
    block: int = 64
    rows: int = 4
    name = "probed_blocks"

    def __post_init__(self) -> None:
        self._check_share("mass")
        self._check_count("block")
        self._check_count("rows")


@dataclass(frozen=True, repr=False)
class AntidiagonalBlocks(DynamicAtom):
    """Per block of queries, the fewest key blocks that hold `mass` of antidiagonal scores at `stride` (XAttention)."""

    mass: float = 0.9
    block: int = 64
    stride: int = 8
    name = "antidiagonal_blocks"

    def __post_init__(self) -> None:
        self._check_share("mass")
        self._check_count("block")
        self._check_count("stride")
        require(
            self.block % self.stride == 0, f"antidiagonal_blocks' block {self.block} must be a multiple of stride {self.stride}"
        )


@dataclass(frozen=True, repr=False)
class PooledBlocks(DynamicAtom):
    """Per block of queries, key blocks whose pooled weight is at least `ratio` of the largest (FlashPrefill's rule, no sort)."""

    ratio: float = 0.05
    block: int = 64
    name = "pooled_blocks"

    def __post_init__(self) -> None:
        self._check_share("ratio")
        self._check_count("block")


@dataclass(frozen=True, repr=False)
class TopBlocks(DynamicAtom):
    """Per block of queries, the `count` key blocks with the largest pooled scores."""

    count: int
    block: int = 64
    name = "top_blocks"

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return [self.count], {"block": self.block}

    def __post_init__(self) -> None:
        self._check_count("count")
        self._check_count("block")
