"""attnsieve show: what a profile, a plan or result rows say, as text and as figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.artefact import CONFIG, read_config
from attnsieve.cli import options, output
from attnsieve.errors import UserError, require
from attnsieve.plan import Plan
from attnsieve.profiling import Profile
from attnsieve.show import (
    draw_all,
    draw_results,
    parse_heads,
    plan_summary,
    plan_text,
    profile_summary,
    profile_text,
    result_table,
)


def show(
    paths: Annotated[list[Path], typer.Argument(help="A plan, a profile, both, or evaluation rows (.jsonl).")],
    out: Annotated[Path | None, typer.Option(help="Also write figures into this directory.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads to draw, as layer:head counted from 0, such as 0:3,5:1.")] = None,
    json: options.Json = False,
) -> None:
    """Describe and draw saved plans, profiles and evaluation rows.

    A plan together with the profile it was fitted from gives the whole picture: mean map, Box-Cox map, true mask and
    extended mask. Example: attnsieve show plans/book profiles/book --heads 0:3,5:1 --out figures
    """
    require(heads is None or out is not None, "--heads says which heads to draw: say where with --out DIRECTORY")
    found = find(paths)
    chosen = None if heads is None else parse_heads(heads)
    figures: list[Path] = []
    if out is not None and (found.plan is not None or found.profile is not None):
        figures += draw_all(out, profile=found.profile, plan=found.plan, heads=chosen)
    if out is not None and found.rows:
        figures += draw_results(out, found.rows)
    if json:
        output.result_json(found.summary() | {"figures": [str(path) for path in figures]})
    else:
        output.result(found.text())
    for path in figures:
        output.note(f"wrote {path}")


@dataclass
class Found:
    """What the given paths hold."""

    plan: Plan | None = None
    profile: Profile | None = None
    rows: list[dict[str, Any]] | None = None

    def summary(self) -> dict[str, Any]:
        """One entry per kind that was given."""
        known = {
            "plan": self.plan and plan_summary(self.plan),
            "profile": self.profile and profile_summary(self.profile),
            "rows": self.rows,
        }
        return {name: value for name, value in known.items() if value}

    def text(self) -> str:
        """The same for people."""
        parts = [
            plan_text(self.plan) if self.plan else "",
            profile_text(self.profile) if self.profile else "",
            result_table(self.rows) if self.rows else "",
        ]
        return "\n\n".join(part for part in parts if part)


def find(paths: list[Path]) -> Found:
    """Load each path by what it is. Raises UserError for something else and for two of a kind."""
    found = Found()
    for path in paths:
        kind, value = _load(path)
        require(getattr(found, kind) is None, f"{path} is a second {kind}: give at most one of each kind")
        setattr(found, kind, value)
    return found


def _load(path: Path) -> tuple[str, Any]:
    if path.suffix == ".jsonl":
        return "rows", _read_rows(path)
    require(path.is_dir(), f"{path} is not there: give the directory of a saved plan or profile, or a .jsonl file of rows")
    kind = read_config(path / CONFIG).get("kind")
    if kind == "attnsieve plan":
        return "plan", Plan.from_pretrained(path)
    if kind == "attnsieve profile":
        return "profile", Profile.from_pretrained(path)
    raise UserError(f"{path} holds {kind!r:.80}, expected a saved plan or profile: check the path")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from attnsieve.evaluation.rows import read_rows

    require(path.is_file(), f"{path} is not there: expected a file that attnsieve eval wrote")
    rows = [asdict(row) for row in read_rows(path)]
    require(bool(rows), f"{path} holds no rows: run attnsieve eval --out {path} first")
    return rows
