"""attnsieve fit: choose one pattern per layer and head from a profile, and save the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.cli import options, output
from attnsieve.errors import require

WORDS = {"true": True, "false": False, "none": None}


def fit(
    profile: Annotated[str, typer.Argument(help="A saved profile: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Directory for the plan.")],
    preset: Annotated[str, typer.Option(help="paper: DAM as published. robust: made to keep what each head does.")] = "robust",
    tau: Annotated[float | None, typer.Option(help="Threshold on the Box-Cox map; 0.3 in the paper.")] = None,
    mu: Annotated[str | None, typer.Option(help="Share of a diagonal or column that must be kept, as 0.8 or 4/5.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of each row's mass kept where the threshold is by mass.")] = None,
    floor: Annotated[float | None, typer.Option(help="A head that would keep less mass than this stays dense.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting as NAME=VALUE, such as min_support=8; repeat for several."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Choose one pattern per layer and head from a profile, and save the plan.

    Settings that are not given come from the preset.

    Example: attnsieve fit profiles/book --preset robust --floor 0.95 --out plans/book
    """
    from attnsieve.fitting import fit as choose
    from attnsieve.profiling import Profile
    from attnsieve.show import plan_summary

    options.new_folder(out)
    given = {"tau": tau, "mu": mu, "share": share, "floor": floor}
    overrides = {name: value for name, value in given.items() if value is not None} | named_values(settings or [])
    plan = choose(Profile.from_pretrained(profile), preset=preset, **overrides)
    plan.save_pretrained(out)
    output.note(
        f"saved in {out}; next: attnsieve show {out}, attnsieve run MODEL --plan {out}, attnsieve eval MODEL --plan {out}"
    )
    if json:
        output.result_json({"out": str(out)} | plan_summary(plan))
    else:
        output.result(str(plan))


def named_values(settings: list[str]) -> dict[str, Any]:
    """{"min_support": 8} from ["min_support=8"]: numbers, true, false, none, else text."""
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        require(bool(equals) and bool(name), f"settings are written NAME=VALUE, such as min_support=8, got {setting!r}")
        values[name.strip()] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
