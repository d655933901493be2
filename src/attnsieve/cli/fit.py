"""attnsieve fit: choose one pattern per layer and head, from profiles or within a budget, and save the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.artefact import CONFIG, read_config
from attnsieve.cli import options, output
from attnsieve.errors import require
from attnsieve.plan import Plan

WORDS = {"true": True, "false": False, "none": None}


def fit(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Saved profiles or measurements, one per kind of text, of which the worst kind decides: directories or hub ids."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the plan.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="For profiles. paper: DAM as published. robust (default): made to keep what each head does. "
            "adaptive: as robust, but heads that no fixed mask serves choose their keys from the input."
        ),
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="For --preset paper: threshold on the Box-Cox map; 0.3 if not given.")
    ] = None,
    mu: Annotated[str | None, typer.Option(help="Share of a diagonal or column that must be kept, as 0.8 or 4/5.")] = None,
    floor: Annotated[float | None, typer.Option(help="A head that would keep less mass than this stays dense.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of a preset as NAME=VALUE, such as min_support=8; repeat for several."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Budget: mean share of causal pairs kept, with the least error.")
    ] = None,
    mass: Annotated[float | None, typer.Option(help="Budget: every head keeps this share of its mass, most cheaply.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Budget: mean over layers of the relative squared output error, at the least density.")
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="With a budget: kv gives the query heads of a KV group one pattern, none does not.")
    ] = None,
    dense_layers: Annotated[int | None, typer.Option(help="Guard rail: the first layers that stay dense.")] = None,
    last_rows: Annotated[
        int | None,
        typer.Option(help="Guard rail, with a budget: last queries of a prompt that keep every key, such as 32 for questions."),
    ] = None,
    dense_decode: Annotated[
        bool, typer.Option("--dense-decode", help="Guard rail, with a budget: decode steps read every key.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Choose one pattern per layer and head, and save the plan.

    From profiles by a preset; settings that are not given come from the preset. Or from measurements (attnsieve measure) within
    exactly one budget: --density, --mass or --max-error. Plans that must answer questions about a prompt need the guard rails
    of the second example, and do better among candidates of `attnsieve measure --wide-windows`.

    Example: attnsieve fit profiles/book --preset robust --floor 0.95 --out plans/book

    Example: attnsieve fit measured/book measured/kv --density 0.25 --last-rows 32 --dense-decode --out plans/quarter
    """
    from attnsieve.show import plan_summary

    options.new_folder(out, Plan)
    budgets = _given(density=density, mass=mass, max_error=max_error)
    given, named, guards = _given(tau=tau, mu=mu, floor=floor), named_values(settings or []), _given(dense_layers=dense_layers)
    _refuse(sorted(named.keys() & {"preset", *given, *guards}), "give it once, by the option of that name")
    overrides = given | named
    if budgets or share is not None or last_rows is not None or dense_decode:
        _refuse(
            sorted(overrides) + ([] if preset is None else ["preset"]),
            "choose by a preset; a budget chooses among measured candidates",
        )
        plan = _within_budget(
            sources, budgets | guards | _given(share=share, last_rows=last_rows, dense_decode=dense_decode or None)
        )
    else:
        plan = _by_preset(sources, preset or "robust", overrides | guards)
    plan.save_pretrained(out)
    at = output.quoted(out)
    output.note(f"saved in {out}; next: attnsieve show {at}, attnsieve run MODEL --plan {at}, attnsieve eval MODEL --plan {at}")
    if json:
        output.result_json({"out": str(out)} | plan_summary(plan))
    else:
        output.result(str(plan))


def _within_budget(sources: list[str], settings: dict[str, Any]) -> Plan:
    from attnsieve.fitting import fit_budget
    from attnsieve.profiling import Measurement

    _refuse_kind(sources, "profile", "budgets need what attnsieve measure saves")
    return fit_budget([Measurement.from_pretrained(source) for source in sources], **settings)


def _by_preset(sources: list[str], preset: str, overrides: dict[str, Any]) -> Plan:
    from attnsieve.fitting import fit as choose
    from attnsieve.profiling import Profile

    _refuse_kind(sources, "measurement", "give a budget, one of --density, --mass and --max-error")
    return choose([Profile.from_pretrained(source) for source in sources], preset=preset, **overrides)


def _refuse_kind(sources: list[str], kind: str, remedy: str) -> None:
    for source in sources:
        config = Path(source) / CONFIG
        other = config.is_file() and read_config(config).get("kind") == f"attnsieve {kind}"
        require(not other, f"{source} is a {kind}: {remedy}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(names: list[str], why: str) -> None:
    require(not names, f"{', '.join(names)}: {why}")


def named_values(settings: list[str]) -> dict[str, Any]:
    """{"min_support": 8} from ["min_support=8"]: numbers, true, false, none, else text."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        require(bool(equals) and bool(name), f"settings are written NAME=VALUE, such as min_support=8, got {setting!r}")
        require(name.strip() not in values, f"{name.strip()} was given twice: give it once")
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
