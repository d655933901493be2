"""Arguments that several commands share, and how they are read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnsieve.artefact import Artefact
from attnsieve.errors import UserError, require
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan

if TYPE_CHECKING:
    import torch

    from attnsieve.fingerprint import Fingerprint

DTYPES = ("float32", "bfloat16", "float16", "float64")

Model = Annotated[
    str, typer.Argument(help="A model directory, a .gguf file, a hub id, or smollm2-135m (SmolLM2-135M-Instruct, no network).")
]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; auto is float32 on the CPU, bfloat16 elsewhere.")]
Backend = Annotated[
    str,
    typer.Option(help="Who computes attention: auto, triton, fa4, dense, portable, reference; fastest may run prompts dense."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.", min=0)]


def parts_of(text: str, separator: str = ",") -> list[str]:
    """["a", "b"] from "a, b". Raises UserError for empty entries."""
    parts = [part.strip() for part in text.split(separator)]
    require(all(parts), f"an entry of the list {text!r} is empty: fill it in, or leave its {separator!r} out")
    return parts


def lengths_of(text: str) -> list[int]:
    """[1024, 2048] from "1024,2048"; K stands for 1024, as in 4K."""
    matches = [re.fullmatch(r"(\d+)([kK]?)", part) for part in parts_of(text)]
    good = all(match is not None and int(match[1]) > 0 for match in matches)
    require(good, f"lengths are positive numbers of tokens such as 1024,2048 or 4K, got {text!r}")
    return [int(match[1]) * (1024 if match[2] else 1) for match in matches if match is not None]


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is what the device computes best."""
    import torch

    require(name in ("auto", *DTYPES), f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load(model: str, device: str, dtype: str):  # type: ignore[no-untyped-def]  # transformers' classes would be imported here
    """The model and its tokenizer."""
    import attnsieve.nn.modeling  # noqa: F401  # lets transformers know models trained here
    from attnsieve.hf.loading import load_model

    where = device_of(device)
    return load_model(model, device=where, dtype=dtype_of(dtype, where))


def read_plan(plan: str | None, pattern: str | None) -> Plan | Pattern:
    """The plan in a directory or on the hub, or a pattern, before any model is loaded. Raises UserError unless it is one."""
    require((plan is None) != (pattern is None), "say what to run: --plan DIRECTORY or --pattern 'sink(4) | window(256)'")
    return Pattern.parse(str(pattern)) if plan is None else Plan.from_pretrained(plan)


def plan_for(chosen: Plan | Pattern, model: Fingerprint) -> Plan:
    """`chosen` for a model: a pattern is for every head."""
    return Plan.uniform(model, chosen) if isinstance(chosen, Pattern) else chosen


def new_folder(path: Path, kind: type[Artefact] | None = None) -> Path:
    """`path`, if a directory can be there, and an artefact of that kind saved in it."""
    require(not path.exists() or path.is_dir(), f"{path} is a file: give a directory with --out")
    _check_place(path)
    if kind is not None:
        kind.check_target(path)
    return path


def rows_file(path: Path | None) -> Path | None:
    """`path`, if rows can be written there."""
    require(path is None or path.suffix == ".jsonl", f"rows are written to a .jsonl file, got {str(path)!r}")
    if path is not None:
        _check_place(path)
    return path


def _check_place(path: Path) -> None:
    """Raise UserError where nothing can be written at `path`: before hours of work, not after."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    require(there == path or there.is_dir(), f"cannot write to {path}: {there} is a file")
    require(os.access(there, os.W_OK), f"cannot write to {path}: {there} is read-only")
