"""Artefacts: directories of config.json + model.safetensors + README.md, written atomically and read strictly.

A file from elsewhere is input like any other: every name, type and size is checked before tensors are allocated, and a
digest over both files says whether they still belong together. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from attnsieve.errors import UserError, require

CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
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


class Artefact(ModelHubMixin):
    """Base of Profile and Plan: how they are saved, loaded and pushed.

    A subclass names its `kind` and its `format_version` and implements the four methods below. The inherited
    `push_to_hub(repo_id)` uploads what `save_pretrained` writes.
    """

    kind: ClassVar[str]
    format_version: ClassVar[int] = 1
    # Set here, the mixin neither records constructor arguments nor sets attributes on frozen instances.
    _hub_mixin_config = {}  # noqa: RUF012

    def to_config(self) -> dict[str, Any]:
        """JSON fields of config.json, without kind, version and digest."""
        raise NotImplementedError

    def to_tensors(self) -> dict[str, Tensor]:
        """Contents of model.safetensors."""
        raise NotImplementedError

    @classmethod
    def expected(cls, config: dict[str, Any]) -> dict[str, Expected]:
        """The tensors that belong to `config`, which may hold anything: raises UserError unless it is sound."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The artefact of a config and tensors that passed `expected`. Raises UserError for contents that do not fit."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artefact) or type(self) is not type(other) or self.to_config() != other.to_config():
            return False
        mine, theirs = self.to_tensors(), other.to_tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{str(self).splitlines()[0]}>"

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write config.json, model.safetensors and README.md into `save_directory`, each replaced in one step.

        A reader that comes between two replacements finds a digest that does not match, never a mixture. The mixin's own
        method is not used because it deletes the old config.json first; its `push_to_hub` passes config and
        model_card_kwargs, which have no meaning here. Raises UserError where nothing can be written, and where a model or an
        artefact of another kind would be replaced.
        """
        require(not config and not model_card_kwargs, "config and model_card_kwargs do not apply: config.json is the artefact")
        target = Path(save_directory)
        self.check_target(target)
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
                self._write(Path(temporary))
                for name in (CARD, TENSORS, CONFIG):
                    os.replace(Path(temporary) / name, target / name)
        except OSError as error:
            raise UserError(f"cannot save the {self.kind} in {target}: {error.strerror or error}") from error

    @classmethod
    def check_target(cls, folder: Path) -> None:
        """Raise UserError where `folder` holds a model, whose files have the same names, or an artefact of another kind."""
        config, tensors = folder / CONFIG, folder / TENSORS
        if config.exists() or tensors.exists():
            kind = read_config(config).get("kind") if config.is_file() else None
            held = f"{kind!r:.80}" if kind else "a model"
            require(
                kind == f"attnsieve {cls.kind}",
                f"{folder} holds {held}, which this {cls.kind} would replace: choose another directory",
            )

    def _write(self, folder: Path) -> None:
        # Through numpy, since torch's writer refuses tensors that share memory. Neither respects strides.
        save_file({name: tensor.contiguous().cpu().numpy() for name, tensor in self.to_tensors().items()}, folder / TENSORS)
        config = {"kind": f"attnsieve {self.kind}", "format_version": self.format_version} | self.to_config()
        config["digest"] = digest(config, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(self.card(), encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load from a directory or, if there is none of that name, from the hub repository `source`.

        Raises UserError for anything but a complete, unchanged artefact of this kind and a known version. The mixin's own
        method is not used because it reads config.json leniently and passes its contents on as arguments.
        """
        folder = Path(source)
        if not folder.is_dir():
            options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            folder = _download(str(source), **options)
        config = read_config(folder / CONFIG)
        kind, version = config.pop("kind", None), config.pop("format_version", None)
        require(kind == f"attnsieve {cls.kind}", f"{folder} holds {kind!r:.80}, expected a saved {cls.kind}: check the path")
        require(
            type(version) is int and 1 <= version <= cls.format_version,
            f"{folder} has {cls.kind} format {version!r:.40}, this version of attnsieve reads 1 to {cls.format_version}: "
            "upgrade attnsieve",
        )
        recorded = config.pop("digest", None)
        expected = cls.expected(config)
        check_header(folder / TENSORS, expected)
        actual = digest({"kind": kind, "format_version": version} | config, folder / TENSORS)
        require(
            recorded == actual,
            f"{folder} was changed after it was written (its digest does not match): save the {cls.kind} again",
        )
        return cls.build(config, read_tensors(folder / TENSORS, expected))

    def card(self) -> str:
        """The model card, README.md."""
        head = f"---\nlibrary_name: attnsieve\ntags: [attnsieve, {self.kind}]\n---\n"
        return f"{head}\n# attnsieve {self.kind}\n\n```\n{self}\n```\n"


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


def _download(repo: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, TENSORS], **options))
    except (OSError, ValueError) as error:  # the hub's errors, network included, derive from these
        raise UserError(
            f"{repo!r} is neither a directory nor a hub repository that can be reached: {type(error).__name__}"
        ) from None


def _some(names: Any) -> str:
    listed = sorted(map(str, names))
    return ", ".join(name[:60] for name in listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
