"""Strict reading: a file from elsewhere is input like any other.

Every name, type and size is checked before tensors are allocated, and a digest over both files says whether they still belong
together. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attnsieve.errors import UserError, require

CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_CONFIG = 64 << 20
MAX_HEADER = 16 << 20
MAX_TENSORS = 64 << 30
DTYPES = {"U8": torch.uint8, "I64": torch.int64, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Expected:
    """What one tensor of a file must be: a dtype of `DTYPES`, by its safetensors name, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def digest(config: Mapping[str, Any], tensors: Path) -> str:
    """sha256 in hex over `config` (canonical JSON) and the bytes of the tensor file."""
    with tensors.open("rb") as file:
        total = hashlib.file_digest(file, "sha256")
    total.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    return total.hexdigest()


def plain_json(value: Any, what: str) -> Any:
    """`value` as it will be after saving and loading. Raises UserError if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be plain JSON (text, finite numbers, lists, dictionaries): {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; refuses duplicate keys, NaN, infinities and anything but an object."""
    return _parse_object(_read(path, MAX_CONFIG), path.name)


def check_header(path: Path, expected: Mapping[str, Expected]) -> None:
    """Raise UserError unless the safetensors file `path` holds exactly the `expected` tensors, back to back, and ends there.

    Reads the header only. The safetensors library itself accepts duplicate names, the last one winning.
    """
    total = sum(tensor.nbytes for tensor in expected.values())
    require(total <= MAX_TENSORS, f"{path.name} would hold {total} bytes of tensors, the limit is {MAX_TENSORS}")
    prefix = _read(path, 8, whole=False)
    require(len(prefix) == 8, f"{path.name} is truncated: it has {len(prefix)} bytes")
    length = int.from_bytes(prefix, "little")
    require(2 <= length <= MAX_HEADER, f"{path.name} announces a header of {length} bytes, expected 2 to {MAX_HEADER}")
    size = path.stat().st_size
    require(
        size == 8 + length + total,
        f"{path.name} has {size} bytes, expected {8 + length + total}: truncated, padded or for another config.json",
    )
    header = _parse_object(_read(path, 8 + length, whole=False)[8:], f"the header of {path.name}")
    metadata = header.pop("__metadata__", {})
    require(metadata in ({}, {"format": "pt"}), f"{path.name} carries metadata that attnsieve does not write")
    require(
        header.keys() == expected.keys(),
        f"{path.name} must hold the tensors {_some(expected.keys())}, got {_some(header.keys())}",
    )
    _check_entries(header, expected, total, path.name)


def read_tensors(path: Path, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
    """The tensors of a file that passed `check_header`. Raises UserError for NaN or infinities."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path.name}: {error}") from None
    for name, tensor in tensors.items():
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        require(finite, f"tensor {name!r} in {path.name} holds NaN or infinity: save the artefact again")
    return tensors


def _check_entries(header: dict[str, Any], expected: Mapping[str, Expected], total: int, name: str) -> None:
    ranges = []
    for key, tensor in expected.items():
        entry = header[key]
        good = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        require(good, f"the entry of tensor {key!r} in {name} must have dtype, shape and data_offsets")
        require(
            entry["dtype"] == tensor.dtype and _whole(entry["shape"]) and entry["shape"] == list(tensor.shape),
            f"tensor {key!r} in {name} must be {tensor.dtype} {list(tensor.shape)}, "
            f"got {entry['dtype']!r:.40} {entry['shape']!r:.80}",
        )
        offsets = entry["data_offsets"]
        good = _whole(offsets) and len(offsets) == 2 and offsets[1] - offsets[0] == tensor.nbytes
        require(good, f"tensor {key!r} in {name} has the wrong number of bytes")
        ranges.append(offsets)
    ranges.sort()
    edges = [0, *(end for _, end in ranges)]
    require([begin for begin, _ in ranges] == edges[:-1] and edges[-1] == total, f"the tensors in {name} overlap or leave gaps")


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float
        )
    except UserError as error:
        raise UserError(f"{what} is not sound: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON: {error}") from None
    require(isinstance(value, dict), f"{what} must be a JSON object, got {type(value).__name__}")
    return dict(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    require(len(fields) == len(pairs), f"the same key appears twice among {_some(fields)}")
    return fields


def _no_constant(text: str) -> float:
    raise UserError(f"{text} is not a number")


def _finite_float(text: str) -> float:
    value = float(text)
    require(math.isfinite(value), f"{text:.40} is too large")
    return value


def _read(path: Path, limit: int, whole: bool = True) -> bytes:
    """The first `limit` bytes; with `whole`, refuses a file that has more."""
    require(path.is_file() or not path.exists(), f"{path} is no regular file: expected what save_pretrained writes")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1 if whole else limit)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a directory with {CONFIG} and {TENSORS}") from None
    require(not whole or len(data) <= limit, f"{path.name} has more than {limit} bytes")
    return data


def _some(names: Any) -> str:
    listed = sorted(map(str, names))
    return ", ".join(name[:60] for name in listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
