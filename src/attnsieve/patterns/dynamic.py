"""Dynamic atoms: rules that choose keys from q and k of the input. How each chooses is in `attnsieve.selection`.

Every choice is made per sequence and head from the queries of the current call, so batch mates and padding never matter.
Chunk rule: each chunk chooses anew from its own queries and all keys so far. Decode rule: a decode step is a chunk of one row.
With share="kv" the query heads of a KV group choose together, by the mean of their attention, and share one mask.
A choice reads whole blocks of queries or the last ones, so within one call it may depend on later queries than the row it is
used for; values never leak, and decode steps are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from attnsieve.errors import UserError, require
from attnsieve.patterns.base import FOREVER, Atom


class CallAtom(Atom):
    """A rule that positions alone do not tell: it needs the call. Shared checks and spelling."""

    dynamic = True
    # Fields that the text form gives by position; fields in (0, 1]; whole numbers from 1, and from 0.
    positional: ClassVar[tuple[str, ...]] = ()
    fractions: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[tuple[str, ...]] = ()
    counts_from_0: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.fractions:
            self._check_fraction(name)
        for name in (*self.counts, *self.counts_from_0):
            self._check_count(name, least=0 if name in self.counts_from_0 else 1)

    def keep(self, i: Tensor, j: Tensor) -> Tensor:
        raise UserError(f"{self} chooses its keys from the input: positions alone do not say what it keeps")

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        named = {option.name: getattr(self, option.name) for option in fields(self)}  # type: ignore[arg-type]
        return [named.pop(name) for name in self.positional], named

    def _check_fraction(self, name: str) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        require(good, f"{self.name}'s {name} must be above 0 and at most 1, got {value!r}")
        object.__setattr__(self, name, float(value))

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        good = type(value) is int and least <= value < FOREVER
        require(good, f"{self.name}'s {name} must be a whole number from {least} to {FOREVER - 1}, got {value!r}")


@dataclass(frozen=True, repr=False)
class DynamicAtom(CallAtom):
    """A rule that reads q and k. share: "none", or "kv" where the query heads of a KV group choose together."""

    share: Literal["none", "kv"] = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        require(self.share in ("none", "kv"), f'{self.name}\'s share must be "none" or "kv", got {self.share!r}')
        super().__post_init__()

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        positional, named = super().arguments()
        share = named.pop("share")
        return positional, named if share == "none" else named | {"share": share}


@dataclass(frozen=True, repr=False)
class VerticalSlash(DynamicAtom):
    """Columns and offsets that hold `mass` of the attention of the last `probe` queries, the fewest of both together.

    `strided` adds that many rows spread over the call to the probe (MInference's pattern with a mass instead of counts). Offsets
    are weighed in bands of `band` neighbours, each by its band's mean, so that they are kept side by side: a tile of scores holds
    hundreds of distances, and is computed for one of them as for all.
    """

    mass: float
    probe: int
    strided: int
    band: int = field(default=1, kw_only=True)
    name = "vertical_slash"
    fractions = ("mass",)
    counts = ("probe", "band")
    counts_from_0 = ("strided",)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        positional, named = super().arguments()
        band = named.pop("band")
        return positional, named if band == 1 else named | {"band": band}


@dataclass(frozen=True, repr=False)
class DamOnline(DynamicAtom):
    """DAM on this input: amplify the probe's attention (Box-Cox), threshold at `tau`, keep columns and offsets whose share of
    kept probe cells reaches `mu` (arXiv 2506.11104, eq. 2-6 on a probe instead of a data set)."""

    tau: float
    mu: float
    probe: int
    strided: int
    name = "dam_online"
    fractions = ("mu",)
    counts = ("probe",)
    counts_from_0 = ("strided",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.tau, (int, float)) and 0 <= self.tau <= 2, f"dam_online's tau must be from 0 to 2, got {self.tau!r}"
        )
        object.__setattr__(self, "tau", float(self.tau))


@dataclass(frozen=True, repr=False)
class ProbedBlocks(DynamicAtom):
    """Per block of queries, the fewest key blocks that hold `mass` of the exact attention of `rows` of its queries."""

    mass: float
    block: int
    rows: int
    name = "probed_blocks"
    fractions = ("mass",)
    counts = ("block", "rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probe(self)


@dataclass(frozen=True, repr=False)
class ProbedKeys(DynamicAtom):
    """Per block of queries, the fewest single keys that hold `mass` of the exact attention of `rows` of its queries."""

    mass: float
    block: int
    rows: int
    name = "probed_keys"
    fractions = ("mass",)
    counts = ("block", "rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probe(self)


def _check_probe(atom: ProbedBlocks | ProbedKeys) -> None:
    require(
        atom.rows <= atom.block,
        f"{atom.name}'s rows are queries of one block, at most its block of {atom.block}, got {atom.rows}: give fewer rows or a "
        "larger block",
    )


@dataclass(frozen=True, repr=False)
class AntidiagonalBlocks(DynamicAtom):
    """Per block of queries, the fewest key blocks that hold `mass` of antidiagonal scores at `stride` (XAttention)."""

    mass: float
    block: int
    stride: int
    name = "antidiagonal_blocks"
    fractions = ("mass",)
    counts = ("block", "stride")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.block % self.stride == 0, f"antidiagonal_blocks' block {self.block} must be a multiple of stride {self.stride}"
        )


@dataclass(frozen=True, repr=False)
class PooledBlocks(DynamicAtom):
    """Per block of queries, key blocks whose pooled weight is at least `ratio` of the largest (FlashPrefill's rule, no sort)."""

    ratio: float
    block: int
    name = "pooled_blocks"
    fractions = ("ratio",)
    counts = ("block",)


@dataclass(frozen=True, repr=False)
class TopBlocks(DynamicAtom):
    """Per block of queries, the `count` key blocks with the largest pooled scores."""

    count: int
    block: int
    name = "top_blocks"
    positional = ("count",)
    counts = ("count", "block")


@dataclass(frozen=True, repr=False)
class HeavyHitters(DynamicAtom):
    """The `recent` newest keys and, of the older ones, the `count` with the largest accumulated attention (H2O, arXiv
    2306.14048). At the end of every block of queries the older keys compete; losers never return, so no row depends on later
    blocks. Keys from before the call first compete by the attention of its first block, in a decode step of its own row.
    """

    count: int
    recent: int
    block: int
    name = "heavy_hitters"
    positional = ("count", "recent")
    counts = ("count", "recent", "block")


@dataclass(frozen=True, repr=False)
class VotedKeys(DynamicAtom):
    """The `probe` newest keys of the call, and the `count` older ones with the largest votes of its last `probe` queries (SnapKV,
    arXiv 2404.14469). A key's vote is the largest summed attention of the `pool` keys around it.
    """

    count: int
    probe: int
    pool: int
    name = "voted_keys"
    positional = ("count",)
    counts = ("count", "probe", "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pool % 2 == 1, f"voted_keys' pool must be odd, to lie around its key, got {self.pool}")


@dataclass(frozen=True, repr=False)
class LastQueries(CallAtom):
    """Every key for the last `count` queries of a call of several, in whole blocks of `block` rows.

    A guard rail for prompts, whose last rows ask the question. It leaves decode steps to the rest of the pattern; the last
    rows of every chunk are dense.
    """

    count: int
    block: int
    name = "last_queries"
    positional = ("count",)
    counts = ("count", "block")


@dataclass(frozen=True, repr=False)
class DensePrefill(CallAtom):
    """Every key in calls of several queries; leaves decode steps to the rest of the pattern."""

    name = "dense_prefill"


@dataclass(frozen=True, repr=False)
class DenseDecode(CallAtom):
    """Every key in calls of one query, which are decode steps; leaves all others to the rest of the pattern."""

    name = "dense_decode"
