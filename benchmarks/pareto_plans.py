"""The plans of `pareto.py` for one model and length, in groups that are made once and kept in a folder."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from attnsieve import Pattern, Plan, UserError
from attnsieve.artefact import Artefact
from attnsieve.errors import require
from attnsieve.evaluation.baselines import (
    CACHE,
    DYNAMIC,
    STATIC,
    cache_baseline,
    dynamic_baseline,
    moa_baseline,
    static_baseline,
)
from attnsieve.evaluation.ledger import plan_digest
from attnsieve.evaluation.rehearsal import rehearsal
from attnsieve.evaluation.tasks.aligned import MANY
from attnsieve.evaluation.tasks.questions import answered_ids
from attnsieve.evaluation.tasks.retrieval import QUERIES
from attnsieve.evaluation.text import text_source, token_windows
from attnsieve.fitting import default_candidates, fit, fit_budget
from attnsieve.fitting.guards import guarded
from attnsieve.hf import fingerprint, measure, profile
from attnsieve.patterns import dense, sink, window
from attnsieve.profiling import Measurement

CALIBRATION_SEED = 1_000_003
DENSITIES = (0.05, 0.1, 0.2, 0.25, 0.5)
# Those that a later look at the results asked for.
CLOSE = (0.1, 0.15, 0.2, 0.25)
# Scored texts differ from those a plan was fitted to: .24 stays below a quarter on them. At .05 a published rule was better than
# budgets with other candidates.
STRICT = (0.05, 0.07, 0.1, 0.15, 0.2, 0.22, 0.24)
MASSES = (0.7, 0.8, 0.9, 0.95)
RATIOS = (0.02, 0.1, 0.3)
PCL = 512
# Rows of a question and its answer, the last ones of a text.
ANSWER_ROWS = 16
# Tokens by which texts may fall short of the length that they were made for.
SLACK = 64
# What every rule may be given besides: the rows that ask, and decode steps, read every key. Methods for prompts are published so.
RAIL = "last_queries(32) | dense_decode()"
FITTED_RAIL: dict[str, Any] = {"last_rows": 32, "dense_decode": True}


@dataclass(frozen=True)
class Workshop:
    """A model and what its plans are calibrated on: rehearsals of these tasks and stretches of this text, `texts` of each.

    Measurements are kept in the folder.
    """

    model: Any
    tokenizer: Any
    tasks: tuple[str, ...]
    text: str
    texts: int
    folder: Path

    def calibration(self, length: int) -> list[list[list[int]]]:
        """Per kind of text some texts of exactly `length` tokens, none of which is scored."""
        kinds = [
            [rehearsal(self.tokenizer, task, length, CALIBRATION_SEED + n) for n in range(self.texts)] for task in self.tasks
        ]
        return [*kinds, token_windows(text_source(self.text), self.tokenizer, length, self.texts, CALIBRATION_SEED)]

    def single_questions(self, task: str, length: int) -> list[list[int]]:
        """Of two documents for each of `texts`, `length` tokens up to a question's answer, which stands last; questions are spread
        over their documents."""
        count, texts = 2 * self.texts, []
        for number in range(count):
            (item,) = MANY[task](QUERIES).items(self.tokenizer, length + SLACK, 1, CALIBRATION_SEED + number)
            ids = answered_ids(self.tokenizer, item, (number + 0.5) / count)
            require(len(ids) >= length, f"a question of {task} has {len(ids)} tokens instead of {length}: raise SLACK")
            texts.append(ids[-length:])
        return texts


def fixed(workshop: Workshop, length: int) -> dict[str, Plan]:
    mark = fingerprint(workshop.model)
    return offered(
        {
            f"{name}-{d:g}": partial(static_baseline, name, mark, density=d, length=length)
            for name, d in product(STATIC, DENSITIES)
        }
    )


def chosen(workshop: Workshop, length: int) -> dict[str, Plan]:
    """Of the published methods and of single keys: the same rule in every head, but for guarded plans' dense first layer."""
    mark = fingerprint(workshop.model)
    plans = {
        f"{name}-{strength:g}": dynamic_baseline(name, mark, strength=strength)
        for name in DYNAMIC
        for strength in (RATIOS if name == "flashprefill" else MASSES)
    }
    guard = "sink(4) | window(32)"
    for mass in MASSES:
        single = Plan.uniform(mark, Pattern.parse(f"{guard} | probed_keys(mass={mass})"))
        plans[f"keys-{mass:g}"] = single
        plans[f"keys-guarded-{mass:g}"] = Plan(mark, ((dense(),) * mark.heads, *single.patterns[1:]))
        plans[f"keys-kv-{mass:g}"] = Plan.uniform(mark, Pattern.parse(f'{guard} | probed_keys(mass={mass}, share="kv")'))
    plans["probed-0.9"] = Plan.uniform(mark, Pattern.parse("sink(4) | window(64) | probed_blocks(mass=0.9, block=16)"))
    return plans


def caches(workshop: Workshop, length: int) -> dict[str, Plan]:
    mark = fingerprint(workshop.model)
    return offered(
        {
            f"{name}-{d:g}": partial(cache_baseline, name, mark, density=d, length=length)
            for name, d in product(CACHE, DENSITIES[::2])
        }
    )


def profiled(workshop: Workshop, length: int) -> dict[str, Plan]:
    """DAM's presets and MoA-like windows, from mean maps."""
    capture = min(PCL, length // 2)
    kinds = [
        profile(workshop.model, texts, pcl=capture, lengths=(length,), progress=False) for texts in workshop.calibration(length)
    ]
    mass = sum(kind.long[-1].offset_mass for kind in kinds)
    mark = fingerprint(workshop.model)
    made = {
        f"dam-paper-{capture}": partial(fit, kinds, preset="paper"),
        "dam-robust-0.9": partial(fit, kinds, preset="robust"),
        "dam-adaptive-0.95": partial(fit, kinds, preset="adaptive"),
    }
    made |= {f"moa-{d:g}": partial(moa_baseline, mark, mass, density=d, length=length) for d in DENSITIES}
    return offered(made)


def budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """A rule per head within a density, with and without guard rails."""
    kinds = measured(workshop, length, "none")
    guarded_too = _budgets("budget-guarded", kinds, DENSITIES, dense_layers=1, last_rows=64)
    return offered(_budgets("budget", kinds, DENSITIES) | guarded_too)


def shared_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """A rule per KV group, whose query heads choose together."""
    return offered(_budgets("budget-kv", measured(workshop, length, "kv"), DENSITIES, share="kv"))


def fitted_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """Within a density that includes the guard rails of `RAIL`: what `attnsieve fit --last-rows 32 --dense-decode` makes."""
    return offered(_budgets("budget-fitted-prompt", measured(workshop, length, "none"), CLOSE, **FITTED_RAIL))


def thorough_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """Single keys are chosen by all queries of a block instead of eight of 64; with and without rails within the density."""
    kinds = measured(workshop, length, "none", rows=64)
    return offered(_budgets("budget-all", kinds, CLOSE) | _budgets("budget-all-fitted-prompt", kinds, CLOSE, **FITTED_RAIL))


def near_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """Among today's usual candidates, whose windows are no wider than a sixteenth of the length."""
    return _near_budgets(workshop, length, {"": {}, "-fitted-prompt": FITTED_RAIL})


def asking_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """As `near_budgets`, with every key for the last rows of a prompt, paid from the budget; decode steps are sparse."""
    return _near_budgets(workshop, length, {"-asked": {"last_rows": 32}})


def answering_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """As `near_budgets` by 8 rows, measured on single questions too, of which the rows that ask and answer alone count: rules that
    choose by a call's last rows (`vertical_slash`) are at their best there, as when answers are scored."""
    return _answering_budgets(workshop, length, "budget-answers", rows=8)


def thorough_answering_budgets(workshop: Workshop, length: int) -> dict[str, Plan]:
    """The same by all 64 rows of a block."""
    return _answering_budgets(workshop, length, "budget-all-answers", rows=64)


def _answering_budgets(workshop: Workshop, length: int, name: str, *, rows: int) -> dict[str, Plan]:
    rules = default_candidates(length, rows=rows)
    make = lambda: [  # noqa: E731
        measure(workshop.model, workshop.single_questions(task, length), rules, last=ANSWER_ROWS, progress=False)
        for task in workshop.tasks
    ]
    kinds = [only(kind, rules) for kind in measured(workshop, length, "none", rows=rows)]
    kinds += _kept(_place(workshop, length, "none", rows, "-answers"), make)
    return offered(_budgets(name, kinds, STRICT))


def _near_budgets(workshop: Workshop, length: int, guards: Mapping[str, Mapping[str, Any]]) -> dict[str, Plan]:
    """guards: what `fit_budget` is given besides, by the end of the plans' names."""
    made: dict[str, Callable[[], Plan]] = {}
    for name, rows in (("budget-near", 8), ("budget-all-near", 64)):
        kinds = [only(kind, default_candidates(length, rows=rows)) for kind in measured(workshop, length, "none", rows=rows)]
        for end, options in guards.items():
            made |= _budgets(name + end, kinds, STRICT, **options)
    return offered(made)


def _budgets(name: str, kinds: list[Measurement], densities: Sequence[float], **options: Any) -> dict[str, Callable[[], Plan]]:
    return {f"{name}-{d:g}": partial(fit_budget, kinds, density=d, **options) for d in densities}


def measured(workshop: Workshop, length: int, share: str, *, rows: int = 8) -> list[Measurement]:
    """One measurement of each kind of text, the kept ones if there are some: of the usual candidates and of wide windows."""
    usual = default_candidates(length, rows=rows, share=share)
    rules = [*(rule for rule in wide_windows(length) if rule not in usual), *usual]
    make = lambda: [measure(workshop.model, texts, rules, progress=False) for texts in workshop.calibration(length)]  # noqa: E731
    return _kept(_place(workshop, length, share, rows), make)


def _place(workshop: Workshop, length: int, share: str, rows: int, end: str = "") -> Path:
    return workshop.folder / f"{length}-{share}{'-thorough' * (rows == 64)}{end}"


def _kept(folder: Path, make: Callable[[], list[Measurement]]) -> list[Measurement]:
    """The measurements in a folder, made if they are not there."""
    if not folder.is_dir():
        place_in_one_step(folder, {str(number): kind for number, kind in enumerate(make())})
    return [Measurement.from_pretrained(path) for path in sorted(folder.iterdir())]


def wide_windows(length: int) -> list[Pattern]:
    """Up to half the length, which were usual candidates until one served a head badly that looks things up (docs/LOG.md)."""
    return [sink(4) | window(width) for width in (length // 8, length // 4, length // 2) if width > 32]


def only(measurement: Measurement, rules: Sequence[Pattern]) -> Measurement:
    """`measurement` as if no other candidates had been measured."""
    wanted = {str(rule) for rule in rules}
    kept = [number for number, text in enumerate(measurement.candidates) if text in wanted]
    tables = {name: getattr(measurement, name)[:, kept] for name in ("density", "retained", "error")}
    return replace(measurement, candidates=tuple(measurement.candidates[number] for number in kept), **tables)


def phases(workshop: Workshop, length: int) -> dict[str, Plan]:
    """Single keys in every head, with every key in decode steps or in prompts, and chosen by more queries than eight of 64."""
    mark, guard = fingerprint(workshop.model), "sink(4) | window(32)"
    rules = {
        "keys-sparse-prefill-0.9": f"{guard} | probed_keys(mass=0.9) | dense_decode()",
        "keys-sparse-decode-0.9": f"{guard} | probed_keys(mass=0.9) | dense_prefill()",
        "keys-asked-0.9": f"{guard} | probed_keys(mass=0.9) | last_queries(32)",
        "keys-by-16-0.9": f"{guard} | probed_keys(mass=0.9, rows=16)",
        "keys-by-32-0.9": f"{guard} | probed_keys(mass=0.9, rows=32)",
        "keys-by-all-0.9": f"{guard} | probed_keys(mass=0.9, rows=64)",
    }
    return {name: Plan.uniform(mark, Pattern.parse(rule)) for name, rule in rules.items()}


GROUPS: dict[str, Callable[[Workshop, int], dict[str, Plan]]] = {
    "budget": budgets,
    "budget-kv": shared_budgets,
    "fitted": fitted_budgets,
    "thorough": thorough_budgets,
    "near": near_budgets,
    "asking": asking_budgets,
    "answering": answering_budgets,
    "answering-all": thorough_answering_budgets,
    "profiled": profiled,
    "chosen": chosen,
    "fixed": fixed,
    "caches": caches,
    "phases": phases,
}


def railed(plans: dict[str, Plan]) -> dict[str, Plan]:
    """The same rules with `RAIL` in every head that is not dense, under names with "-prompt" before their number."""
    return {_with_mark(name): _railed(plan) for name, plan in plans.items()}


def _with_mark(name: str) -> str:
    start, dash, number = name.rpartition("-")
    return f"{start}-prompt-{number}" if dash and number[:1].isdigit() else f"{name}-prompt"


def _railed(plan: Plan) -> Plan:
    rail = Pattern.parse(RAIL)
    rows = tuple(tuple(guarded(pattern, rail) for pattern in row) for row in plan.patterns)
    return Plan(plan.fingerprint, rows, {**plan.provenance, "rail": RAIL})


def offered(made: dict[str, Callable[[], Plan]]) -> dict[str, Plan]:
    """Those plans that can be made; the reason is printed for the others."""
    plans = {}
    for name, make in made.items():
        try:
            plans[name] = make()
        except UserError as error:
            print(f"{name}: {error}", flush=True)
    return plans


@dataclass(frozen=True)
class Shelf:
    """Plans on disk: root / length / group / name. A group appears in one step, so it is whole or absent."""

    root: Path

    def put(self, length: int, group: str, plans: dict[str, Plan]) -> None:
        place_in_one_step(self.root / str(length) / group, plans)

    def has(self, length: int, group: str) -> bool:
        return (self.root / str(length) / group).is_dir()

    def get(self, length: int, group: str) -> dict[str, Plan]:
        return _read(self.root / str(length) / group)


def place_in_one_step(target: Path, artefacts: Mapping[str, Artefact]) -> None:
    """Save them into a new folder by their names; if others were faster, theirs stay."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    for name, artefact in artefacts.items():
        artefact.save_pretrained(fresh / name)
    if target.exists():
        shutil.rmtree(fresh)
    else:
        fresh.rename(target)


@cache
def _read(group: Path) -> dict[str, Plan]:
    return {path.name: Plan.from_pretrained(path) for path in sorted(group.iterdir())}


# Of a plan's provenance, what a summary tells.
TOLD = ("method", "preset", "pcl", "budget", "share", "guards", "expected", "heads")
TOLD += ("reach", "reach_bound", "bound", "strength", "rail")


def summary(model: str, length: int, name: str, plan: Plan) -> str:
    """One JSON line: what a plan was asked for, what it expects of itself, and for DAM's how far it can look back."""
    about = {key: plan.provenance[key] for key in TOLD if key in plan.provenance}
    density = None if plan.density is None else float(plan.density.mean())
    return json.dumps(
        {"model": model, "length": length, "plan": name, "plan_digest": plan_digest(plan), "density": density, **about}
    )
