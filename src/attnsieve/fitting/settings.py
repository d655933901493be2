"""Settings of a fit, and the presets."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from attnsieve.dam import EPS, LAM, TAU
from attnsieve.dam.matching import exact_ratio
from attnsieve.errors import UserError, require

NUMBERS = ("tau", "lam", "eps", "share", "kappa", "floor")
FLAGS = ("force_self", "join", "local")
COUNTS = ("force_sink", "dense_layers")
# What each threshold reads.
READ = {"absolute": ("tau", "lam", "eps"), "mass": ("share",), "relative": ("kappa",)}


@dataclass(frozen=True)
class Settings:
    """How a plan is fitted; the defaults are the paper's.

    threshold: how the true mask is cut from the mean map: "absolute" (`tau`, `lam`, `eps`; the paper), "mass" (the largest
    cells that hold `share` of each row), or "relative" (`kappa` times uniform attention).
    mu, min_support: a diagonal or column of n cells matches if at least mu n of them are kept and n >= min_support; None
    stands for a quarter of the capture length. pcl: a capture length below the profile's, or None for the profile's.
    force_self, force_sink: keep every query's own key and the first force_sink keys, whatever the map says.
    join: matched patterns also hold below the capture length, beside the true mask.
    floor: a head whose patterns keep less than this share of mass takes the fallback; 0 turns that off.
    fallback: "dense", or "keys": single keys with `floor` of the mass, chosen from the input for every block of queries.
    local: also consider sink(s) | window(w) per head, and take it where it meets the floor with fewer pairs.
    dense_layers: the first layers that stay dense, a guard rail.
    """

    threshold: Literal["absolute", "mass", "relative"] = "absolute"
    tau: float = TAU
    lam: float = LAM
    eps: float = EPS
    share: float = 0.95
    kappa: float = 1.0
    mu: float | str = 0.8
    min_support: int | None = 1
    pcl: int | None = None
    force_self: bool = False
    force_sink: int = 0
    join: bool = False
    floor: float = 0.0
    fallback: Literal["dense", "keys"] = "dense"
    local: bool = False
    dense_layers: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        require(self.threshold in READ, f"threshold must be one of {', '.join(READ)}, got {self.threshold!r}")
        exact_ratio(self.mu)
        support = self.min_support
        require(
            support is None or (type(support) is int and support >= 1),
            f"min_support must be a whole number from 1, or none, got {support!r}",
        )
        require(self.tau >= 0, f"tau must be at least 0, where everything is kept, got {self.tau!r}")
        require(0 <= self.floor <= 1, f"floor is a share of mass from 0 to 1, got {self.floor!r}")
        require(self.kappa >= 0, f"kappa must be at least 0, where everything is kept, got {self.kappa!r}")
        require(self.fallback in ("dense", "keys"), f"fallback must be dense or keys, got {self.fallback!r}")
        require(self.fallback == "dense" or self.floor > 0, "heads that fall back to keys keep the floor: set one above 0")
        require(not self.local or self.floor > 0, "local rules are chosen by their mass: set a floor above 0 with local")

    def _check_kinds(self) -> None:
        """Settings come from command lines too, where "no" or "1e-3x" is text."""
        for name in NUMBERS:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number and math.isfinite(value), f"{name} must be a finite number, got {value!r}")
        for name in FLAGS:
            require(type(getattr(self, name)) is bool, f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in COUNTS:
            value = getattr(self, name)
            require(type(value) is int and value >= 0, f"{name} must be a whole number, got {value!r}")

    def to_json(self) -> dict[str, Any]:
        """All fields, for a plan's provenance."""
        return asdict(self)


ROBUST = Settings(
    threshold="mass", share=0.95, min_support=None, force_self=True, force_sink=4, join=True, floor=0.9, local=True
)
PRESETS = {"paper": Settings(), "robust": ROBUST, "adaptive": replace(ROBUST, fallback="keys", floor=0.95)}


def resolve(preset: str, overrides: dict[str, Any]) -> Settings:
    """The preset's settings with `overrides`. Raises UserError for an unknown preset or setting, with the nearest name, and for
    settings of a threshold that is not used."""
    require(preset in PRESETS, f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    names = [field.name for field in fields(Settings)]
    for name in overrides:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
        if name not in names:
            raise UserError(f"unknown setting {name!r}; {hint}")
    chosen = replace(PRESETS[preset], **overrides)
    for threshold, read in READ.items():
        idle = [name for name in read if name in overrides]
        require(
            threshold == chosen.threshold or not idle,
            f"{', '.join(idle)}: only threshold={threshold} reads that, preset {preset!r} has threshold={chosen.threshold} here: "
            "set the threshold too, or leave it out",
        )
    return chosen
