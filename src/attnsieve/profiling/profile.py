"""Profile: what calibration saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnsieve.artefact import Artefact, Expected, plain_json
from attnsieve.errors import require
from attnsieve.fingerprint import Fingerprint

MAX_PCL = 1 << 16
MAX_LENGTH = 1 << 27
# Rows of probabilities add up to 1; float32 sums of many documents come this close.
SLACK = 1e-3


@dataclass(frozen=True)
class LongStatistics:
    """Where mass lies in rows pcl .. length - 1, summed over `rows` rows of documents of at least `length` tokens.

    column_mass, offset_mass: float32 [layers, heads, length], by key position j and by distance i - j; each adds up to rows.
    """

    length: int
    rows: int
    column_mass: Tensor
    offset_mass: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Profile(Artefact):
    """Attention of a frozen model over calibration text, per layer and query head.

    pcl: the pattern capture length L. maps: float32 [layers, heads, L, L], mean post-softmax probabilities (Abar), zero above
    the diagonal, or None; rows_seen: int64 [L], documents that reached row i (c_i), given with maps. long: by ascending length.
    provenance: JSON, the data and settings. Raises UserError for shapes or values that cannot be probabilities.
    """

    fingerprint: Fingerprint
    pcl: int
    maps: Tensor | None = None
    rows_seen: Tensor | None = None
    long: tuple[LongStatistics, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "profile"

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", plain_json(self.provenance, "a profile's provenance"))
        good = type(self.pcl) is int and 0 < self.pcl <= MAX_PCL
        require(good, f"a profile's capture length must be from 1 to {MAX_PCL}, got {self.pcl!r}")
        require((self.maps is None) == (self.rows_seen is None), "maps and rows_seen come together")
        heads = (self.fingerprint.layers, self.fingerprint.heads)
        if self.maps is not None and self.rows_seen is not None:
            _check_maps(self.maps, self.rows_seen, (*heads, self.pcl, self.pcl))
        lengths = [statistics.length for statistics in self.long]
        require(lengths == sorted(set(lengths)), f"probed lengths must ascend, got {lengths}")
        for statistics in self.long:
            _check_long(statistics, self.pcl, (*heads, statistics.length))

    def __str__(self) -> str:
        model = self.fingerprint
        lines = [f"profile of {model.model_type}: {model.layers} layers x {model.heads} heads, capture length {self.pcl}"]
        if self.rows_seen is not None:
            lines.append(f"maps: {int(self.rows_seen[0])} documents, {int(self.rows_seen[-1])} of them reach the last row")
        lines += [f"length {statistics.length}: {statistics.rows} rows beyond {self.pcl}" for statistics in self.long]
        return "\n".join(lines)

    def to_config(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "pcl": self.pcl,
            "maps": self.maps is not None,
            "long": [{"length": statistics.length, "rows": statistics.rows} for statistics in self.long],
            "provenance": self.provenance,
        }

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        if self.maps is not None and self.rows_seen is not None:
            i, j = torch.tril_indices(self.pcl, self.pcl)
            tensors = {"maps": self.maps[..., i, j], "rows_seen": self.rows_seen}
        for statistics in self.long:
            tensors[f"column_mass.{statistics.length}"] = statistics.column_mass
            tensors[f"offset_mass.{statistics.length}"] = statistics.offset_mass
        return tensors

    @classmethod
    def expected(cls, config: dict[str, Any]) -> dict[str, Expected]:
        fields = {"fingerprint", "pcl", "maps", "long", "provenance"}
        require(config.keys() == fields, f"a profile's config.json has the fields {sorted(fields)}, got {sorted(config)}")
        model, pcl = Fingerprint.from_json(config["fingerprint"]), config["pcl"]
        require(type(pcl) is int and 0 < pcl <= MAX_PCL, f"pcl must be from 1 to {MAX_PCL}, got {pcl!r:.40}")
        require(
            type(config["maps"]) is bool and isinstance(config["provenance"], dict), "maps must be a bool, provenance an object"
        )
        require(isinstance(config["long"], list), "long must be a list")
        tensors: dict[str, Expected] = {}
        if config["maps"]:
            tensors["maps"] = Expected("F32", (model.layers, model.heads, pcl * (pcl + 1) // 2))
            tensors["rows_seen"] = Expected("I64", (pcl,))
        for entry in config["long"]:
            good = isinstance(entry, dict) and entry.keys() == {"length", "rows"}
            require(good and all(type(value) is int for value in entry.values()), "entries of long have length and rows")
            require(pcl < entry["length"] <= MAX_LENGTH, f"a probed length must be from {pcl + 1} to {MAX_LENGTH}")
            shape = (model.layers, model.heads, entry["length"])
            tensors |= {f"{name}.{entry['length']}": Expected("F32", shape) for name in ("column_mass", "offset_mass")}
        return tensors

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        pcl, maps = config["pcl"], None
        if config["maps"]:
            packed = tensors["maps"]
            maps = packed.new_zeros(*packed.shape[:2], pcl, pcl)
            i, j = torch.tril_indices(pcl, pcl)
            maps[..., i, j] = packed
        long = tuple(
            LongStatistics(
                entry["length"],
                entry["rows"],
                tensors[f"column_mass.{entry['length']}"],
                tensors[f"offset_mass.{entry['length']}"],
            )
            for entry in config["long"]
        )
        fingerprint = Fingerprint.from_json(config["fingerprint"])
        return cls(fingerprint, pcl, maps, tensors.get("rows_seen"), long, config["provenance"])


def _check_maps(maps: Tensor, rows_seen: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor("maps", maps, torch.float32, shape)
    _check_tensor("rows_seen", rows_seen, torch.int64, shape[-1:])
    falling = bool((rows_seen[1:] <= rows_seen[:-1]).all()) and int(rows_seen[-1]) > 0
    require(falling, "rows_seen must be positive and never rise: every document that reaches a row reaches those before it")
    for layer in maps:  # one at a time: a whole-tensor comparison would double the memory of large profiles
        sound = bool((layer >= 0).all()) and bool((layer.sum(-1) <= 1 + SLACK).all()) and not bool(layer.triu(1).any())
        require(sound, "maps must hold causal probabilities: none negative, none after the query, rows of at most 1")


def _check_long(statistics: LongStatistics, pcl: int, shape: tuple[int, ...]) -> None:
    require(statistics.length > pcl, f"probed lengths must exceed the capture length {pcl}, got {statistics.length}")
    require(statistics.rows > 0, f"statistics of length {statistics.length} cover no rows")
    for name in ("column_mass", "offset_mass"):
        mass = getattr(statistics, name)
        _check_tensor(name, mass, torch.float32, shape)
        sound = bool((mass >= 0).all()) and bool((mass.sum(-1) <= statistics.rows * (1 + SLACK)).all())
        require(sound, f"{name} of length {statistics.length} must be non-negative and add up to at most its rows")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    good = tensor.dtype == dtype and tensor.shape == shape
    require(good, f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
