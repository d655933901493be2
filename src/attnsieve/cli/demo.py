"""attnsieve demo: the whole way on a small real model, from text to figures, in a few minutes on two cores."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm.auto import tqdm

from attnsieve.cli import options, output
from attnsieve.errors import require
from attnsieve.patterns import dense
from attnsieve.plan import Plan
from attnsieve.profiling import Profile
from attnsieve.show import draw_all, draw_results, markdown, percent, result_table
from attnsieve.show.results import with_error

if TYPE_CHECKING:
    from attnsieve.evaluation import Row
    from attnsieve.evaluation.text import TextSource

PRESETS = ("paper", "robust", "adaptive")
TEXT = "python-docs"
WIDTH = 100
# Short documents steady the mean maps, which end at the capture length; a few long ones show what lies beyond.
LONG_DOCUMENTS, SHORT_DOCUMENTS = 2, 4
FIDELITY_ITEMS = 1
ANSWER_TOKENS = 6


def demo(
    out: Annotated[Path, typer.Option(help="Directory for plans, rows, figures and the summary.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="A model directory, a .gguf file, a hub id, or smollm2-135m.")] = "smollm2-135m",
    length: Annotated[
        int, typer.Option(help="Length of the long texts in tokens; maps are captured for a quarter.", min=128)
    ] = 2048,
    items: Annotated[int, typer.Option(help="Lists with eight questions each that every plan answers.", min=2)] = 2,
) -> None:
    """Profile a small model, fit three plans, run and measure them beside dense attention, and draw it all.

    Example: attnsieve demo --out runs/demo
    """
    options.new_folder(out)
    require(find_spec("matplotlib") is not None, "the demo draws figures with matplotlib; run: pip install 'attnsieve[viz]'")
    start = time.perf_counter()
    network, tokenizer = options.load(model, "auto", "auto")
    lab = Lab(network, tokenizer, model, length, out)
    lab.story.title(f"{model}: {type(network).__name__} on {network.device}, {str(network.dtype).removeprefix('torch.')}")
    profile = lab.calibrate()
    plans = lab.fit(profile)
    lab.generate(plans)
    rows = lab.measure(plans, items)
    lab.draw(profile, plans, rows)
    lab.story.show(next_steps(model, out))
    lab.story.say(f"Done in {time.perf_counter() - start:.0f} s.")
    (out / "summary.txt").write_text(lab.story.text(), encoding="utf-8")


@dataclass
class Story:
    """What the demo says: printed as it comes, kept for summary.txt."""

    parts: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        """The heading of a step."""
        self.parts.append(f"{text}\n{'=' * len(text)}")
        typer.secho(text, bold=True)

    def say(self, text: str) -> None:
        """A paragraph of prose."""
        self.show(textwrap.fill(text, WIDTH))

    def show(self, text: str) -> None:
        """Lines as they are."""
        self.parts.append(text)
        typer.echo(f"{text}\n")

    def text(self) -> str:
        """All of it."""
        return "\n\n".join(self.parts) + "\n"


@dataclass(frozen=True)
class Lab:
    """A model, and the steps that the demo takes with it."""

    network: Any
    tokenizer: Any
    name: str
    length: int
    out: Path
    story: Story = field(default_factory=Story)

    def calibrate(self) -> Profile:
        """Observe the model on both kinds of text."""
        from attnsieve.evaluation import text_source, token_windows
        from attnsieve.hf import profile

        pcl = self.length // 4
        self.story.title("1. Profile: what does every head attend to?")
        sources = [halves(TEXT)[0], text_source("synthetic")]
        texts = [
            window
            for tokens, count, seed in ((self.length, LONG_DOCUMENTS, 0), (pcl, SHORT_DOCUMENTS, 1))
            for source in sources
            for window in token_windows(source, self.tokenizer, tokens, count // 2, seed)
        ]
        self.story.say(
            f"{LONG_DOCUMENTS} texts of {self.length} tokens and {SHORT_DOCUMENTS} of {pcl}: half from the Python reference, "
            f"half synthetic records and stories. Mean maps up to {pcl} tokens, sums by column and by distance up to "
            f"{self.length}."
        )
        found = profile(self.network, texts, pcl=pcl, lengths=(self.length,), provenance={"model": self.name, "data": "demo"})
        found.save_pretrained(self.out / "profile")
        return found

    def fit(self, profile: Profile) -> dict[str, Plan]:
        """Fit all presets, save them, and go on with what was read back."""
        from attnsieve.fitting import fit

        self.story.title("2. Fit: one pattern per head")
        plans = {}
        for preset in tqdm(PRESETS, desc="fit", unit="plan"):
            fit(profile, preset=preset).save_pretrained(self.out / preset)
            plans[preset] = Plan.from_pretrained(self.out / preset)
        self.story.say(
            "paper: DAM as published. robust: masks by mass, and dense where no fixed mask keeps enough. adaptive: as robust, "
            "but those heads choose their keys from the input. Percent of causal pairs kept and of attention mass inside them, "
            f"mean over the heads of a layer, at {self.length} tokens; what adaptive keeps depends on the input:"
        )
        self.story.show(layer_table(plans))
        return plans

    def generate(self, plans: Mapping[str, Plan]) -> None:
        """Answer one question about a long prompt, dense and under every plan."""
        from attnsieve.evaluation import make_task
        from attnsieve.evaluation.tokens import encode

        self.story.title("3. Run: dense and sparse generation on a long prompt")
        (item,) = make_task("kv").items(self.tokenizer, self.length + self.length // 8, 1, 1)
        query = item.queries[len(item.queries) // 2]
        ids = encode(self.tokenizer, query.prompt)
        question = query.prompt.splitlines()[-1]
        self.story.say(f'A list of {len(ids)} tokens such as "{query.prompt.splitlines()[0]}" ends with "{question}".')
        runs: dict[str, Plan | None] = {"dense": None, **plans}
        lines = [self._answer(name, plan, ids) for name, plan in tqdm(runs.items(), desc="generate", unit="run")]
        self.story.say(
            f"The right answer is {query.answers[0]}. Seconds include compiling the masks, once for each plan; a model this "
            "small spends most of its time outside attention."
        )
        self.story.show(markdown(["attention", "answer", "seconds", "calls that ran sparse"], lines, left=[0, 1]))

    def _answer(self, name: str, plan: Plan | None, ids: list[int]) -> list[str]:
        from attnsieve.cli.run import generate
        from attnsieve.hf import apply

        with nullcontext() if plan is None else apply(self.network, plan) as handle:
            start = time.perf_counter()
            new = generate(self.network, self.tokenizer, ids, ANSWER_TOKENS, stream=False)
            seconds = time.perf_counter() - start
        text = self.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].strip()
        return [name, text, f"{seconds:.1f}", str(handle.report().sparse_calls if handle else 0)]

    def measure(self, plans: Mapping[str, Plan], items: int) -> list[dict[str, Any]]:
        """Key-value retrieval and fidelity of all plans, each beside dense attention on the same items."""
        from attnsieve.evaluation import evaluate, make_task
        from attnsieve.evaluation.tasks.language import Fidelity

        self.story.title("4. Measure: what does it cost?")
        path = self.out / "rows.jsonl"
        path.unlink(missing_ok=True)
        half = self.length // 2
        rows: list[Row] = evaluate(self.network, self.tokenizer, plans, [make_task("kv")], [half], items, out=path)
        fidelity = Fidelity(halves(TEXT)[1])
        rows += evaluate(self.network, self.tokenizer, plans, [fidelity], [half], FIDELITY_ITEMS, out=path)
        found = [asdict(row) for row in rows]
        self.story.say(
            f"Key-value retrieval: {items} lists of {half} tokens, 8 questions each, answers teacher-forced. Density, KL, "
            f"agreement and retained mass: {FIDELITY_ITEMS} text of {half} tokens from chapters that calibration did not see. "
            "Means with their standard errors."
        )
        self.story.show(cost_table(found, ["dense", *plans]))
        return found

    def draw(self, profile: Profile, plans: Mapping[str, Plan], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all figures, and say where they are."""
        self.story.title("5. Look")
        folder = self.out / "figures"
        paths = draw_results(folder / "results", rows)
        for name, plan in tqdm(plans.items(), desc="figures", unit="plan"):
            paths += draw_all(folder / name, profile=profile, plan=plan)
        (self.out / "rows.md").write_text(result_table(rows) + "\n", encoding="utf-8")
        self.story.show("\n".join(str(path) for path in paths))


def layer_table(plans: Mapping[str, Plan]) -> str:
    """Per layer and plan: density and retained mass where they are known, and how many heads are dense or choose."""
    header = ["layer", *(f"{name} {what}" for name, plan in plans.items() for what in _layer_columns(plan))]
    layers = range(next(iter(plans.values())).fingerprint.layers)
    cells = [
        [str(layer), *(cell for plan in plans.values() for cell in _layer_cells(plan, slice(layer, layer + 1)))]
        for layer in layers
    ]
    everything = [cell for plan in plans.values() for cell in _layer_cells(plan, slice(None))]
    return markdown(header, [*cells, ["all", *everything]], left=())


def _layer_cells(plan: Plan, layers: slice) -> list[str]:
    heads = [rule for row in plan.patterns[layers] for rule in row]
    shares = [percent(float(share[layers].mean())) for share in (plan.density, plan.retained) if share is not None]
    choosing = sum(rule.dynamic for rule in heads) if plan.dynamic else sum(rule == dense() for rule in heads)
    return [*shares, f"{choosing} of {len(heads)}"]


def _layer_columns(plan: Plan) -> list[str]:
    shares = [name for name, share in (("density", plan.density), ("mass", plan.retained)) if share is not None]
    return [*shares, "choosing heads" if plan.dynamic else "dense heads"]


def cost_table(rows: Sequence[Mapping[str, Any]], plans: Sequence[str]) -> str:
    """One line per plan, one column per metric."""
    metrics = {
        "retained_mass": "retained mass",
        "kl": "KL to dense",
        "top1_agreement": "same top token",
        "exact_match": "kv exact match",
        "answer_nll": "kv answer NLL",
    }
    found = {(row["plan"], row["metric"]): row for row in rows}
    cells = [
        [
            plan,
            percent(found[plan, "kl"]["density"]),
            *(with_error(found[plan, metric]["value"], found[plan, metric]["stderr"]) for metric in metrics),
        ]
        for plan in plans
    ]
    return markdown(["attention", "density %", *metrics.values()], cells)


def halves(name: str) -> tuple[TextSource, TextSource]:
    """A text in two: one half to calibrate on, one to measure on."""
    from attnsieve.evaluation.text import TextSource, text_source

    text = text_source(name).read(0)
    middle = len(text) // 2
    return TextSource(f"{name}, first half", lambda _: text[:middle]), TextSource(
        f"{name}, second half", lambda _: text[middle:]
    )


def next_steps(model: str, out: Path) -> str:
    """Commands that go on from here."""
    plan, profile, model = (output.quoted(name) for name in (out / "robust", out / "profile", model))
    return "\n".join(
        [
            "Try next:",
            f"  attnsieve show {plan} {profile} --heads 0:3,5:1 --out figures",
            f"  attnsieve run {model} --plan {plan} --prompt 'Once upon a time'",
            f"  attnsieve eval {model} --plan {plan} --pattern 'sink(4) | window(256)' --tasks kv --lengths 1024",
        ]
    )
