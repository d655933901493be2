"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import typer


def result(text: str) -> None:
    """The result, for people."""
    typer.echo(text)


def result_json(data: dict[str, Any]) -> None:
    """The result, for programs: one JSON object."""
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1))


def quoted(path: str | Path) -> str:
    """`path` as it is written in a shell command."""
    return shlex.quote(str(path))


def note(text: str) -> None:
    """What happens, and what could be done next."""
    typer.echo(text, err=True)
