"""What a result row says of the place it was measured in: versions, commit, command and date."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "flash-attn-4", "transformers", "attnsieve")


def environment() -> dict[str, Any]:
    """versions by package, those that are not installed left out; commit; command; date, UTC."""
    return {
        "versions": {"python": sys.version.split()[0], "cuda": torch.version.cuda} | _versions(),
        "commit": commit(),
        "command": command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command(arguments: list[str]) -> str:
    """The command line without the folders of this machine."""
    program, *rest = (Path(part).name if Path(part).is_absolute() else part for part in arguments)
    return " ".join(
        [{"__main__.py": "python -m attnsieve"}.get(program, program), *(f"'{x}'" if " " in x else x for x in rest)]
    )


def commit() -> str | None:
    """GIT_COMMIT, for copies of a checkout without its history; else the commit that the package is imported from, marked where
    it has changes; None when installed."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    try:
        # Installed in a folder of another checkout, the package is not tracked there.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    ask = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
