"""attnsieve show: what profiles, a plan, a measurement or result rows say, as text, as figures and as a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.artefact import CONFIG, read_config
from attnsieve.cli import options, output
from attnsieve.errors import UserError, require
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile, Stability
from attnsieve.show import (
    draw_all,
    draw_measurement,
    draw_results,
    draw_stability,
    measurement_text,
    parse_heads,
    plan_summary,
    plan_text,
    profile_summary,
    profile_text,
    result_table,
    stability_summary,
    stability_text,
    write_report,
)


def show(
    paths: Annotated[
        list[Path], typer.Argument(help="A plan, profiles, a measurement, evaluation rows (.jsonl), in any mixture.")
    ],
    out: Annotated[Path | None, typer.Option(help="Also write figures into this directory.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write one interactive page, which needs no network: report.html.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Heads to draw, as layer:head counted from 0, such as 0:3,5:1.")] = None,
    preset: Annotated[
        str, typer.Option(help="For several profiles: whose settings make the masks that are compared.")
    ] = "robust",
    json: options.Json = False,
) -> None:
    """Describe and draw saved plans, profiles, measurements and evaluation rows.

    A plan together with the profile it was fitted from gives the whole picture: mean map, Box-Cox map, true mask and
    extended mask. Several profiles, one per document, are compared: which heads a fixed mask can serve.

    Example: attnsieve show plans/book profiles/book rows.jsonl --out figures --html report.html
    """
    drawn = out is not None or html is not None
    require(heads is None or drawn, "--heads says which heads to draw: say where with --out DIRECTORY or --html FILE")
    found = find(paths, preset)
    paged = found.plan or found.profile or found.rows
    require(
        html is None or bool(paged),
        "a page shows a plan, a profile or rows: give one of them with --html; --out DIRECTORY draws measurements",
    )
    chosen = None if heads is None else parse_heads(heads)
    written = [] if out is None else found.draw(out, chosen)
    if html is not None:
        written.append(write_report(html, plan=found.plan, profile=found.profile, rows=found.rows, heads=chosen))
    if json:
        output.result_json(found.summary() | {"figures": [str(path) for path in written]})
    else:
        output.result(found.text())
    for path in written:
        output.note(f"wrote {path}")


@dataclass
class Found:
    """What the given paths hold."""

    plan: Plan | None = None
    profiles: dict[str, Profile] = field(default_factory=dict)
    measurement: Measurement | None = None
    rows: list[dict[str, Any]] | None = None
    stability: Stability | None = None

    @property
    def profile(self) -> Profile | None:
        """The only profile, or the first one."""
        return next(iter(self.profiles.values()), None)

    def summary(self) -> dict[str, Any]:
        """One entry per kind that was given."""
        known = {
            "plan": self.plan and plan_summary(self.plan),
            "profile": self.profile and profile_summary(self.profile),
            "stability": self.stability and stability_summary(self.stability),
            "measurement": self.measurement and self.measurement.to_config(),
            "rows": self.rows,
        }
        return {name: value for name, value in known.items() if value}

    def text(self) -> str:
        """The same for people."""
        parts = [
            plan_text(self.plan) if self.plan else "",
            profile_text(self.profile) if self.profile and not self.stability else "",
            stability_text(self.stability) if self.stability else "",
            measurement_text(self.measurement) if self.measurement else "",
            result_table(self.rows) if self.rows else "",
        ]
        return "\n\n".join(part for part in parts if part)

    def draw(self, out: Path, heads: list[tuple[int, int]] | None) -> list[Path]:
        """The figures of everything that was given."""
        figures: list[Path] = []
        if self.plan is not None or self.profile is not None:
            figures += draw_all(out, profile=self.profile, plan=self.plan, heads=heads)
        if self.stability is not None:
            figures += draw_stability(out, self.stability)
        if self.measurement is not None:
            # A plan from elsewhere has rules that were not measured.
            rules = {str(rule) for row in self.plan.patterns for rule in row} if self.plan else set()
            measured = rules <= set(self.measurement.candidates)
            figures += draw_measurement(out, self.measurement, self.plan if measured else None)
        if self.rows:
            figures += draw_results(out, self.rows)
        return figures


def find(paths: list[Path], preset: str) -> Found:
    """Load each path by what it is. Raises UserError for something else and for two of a kind, profiles apart."""
    found = Found()
    for path in paths:
        kind, value = _load(path)
        if kind == "profile":
            require(str(path) not in found.profiles, f"{path} was given twice")
            found.profiles[str(path)] = value
            continue
        require(getattr(found, kind) is None, f"{path} is a second {kind}: give at most one of each kind, profiles apart")
        setattr(found, kind, value)
    if len(found.profiles) > 1:
        from attnsieve.fitting import stability

        found.stability = stability(list(found.profiles.values()), names=list(found.profiles), preset=preset)
    return found


def _load(path: Path) -> tuple[str, Any]:
    if path.suffix == ".jsonl":
        return "rows", _read_rows(path)
    wrong = f"{path} is no directory" if path.exists() else f"{path} is not there"
    require(path.is_dir(), f"{wrong}: give the directory of a saved plan or profile, or a .jsonl file of rows")
    kind = str(read_config(path / CONFIG).get("kind", "a model"))
    for known in (Plan, Profile, Measurement):
        if kind == f"attnsieve {known.kind}":
            return known.kind, known.from_pretrained(path)
    raise UserError(f"{path} holds {kind!r:.80}, expected a saved plan, profile or measurement: check the path")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from attnsieve.evaluation.rows import read_rows

    require(path.is_file(), f"{path} is not there: expected a file that attnsieve eval wrote")
    rows = [asdict(row) for row in read_rows(path)]
    require(bool(rows), f"{path} holds no rows: run attnsieve eval --out {path} first")
    return rows
