"""What DAM's settings and its calibration text are worth: one factor at a time, on held-out text.

    python benchmarks/ablation.py smollm2-135m --pcls 128,256,512 --length 1024 --out benchmarks/results/ablation-smollm2.jsonl

Factors: capture length, lambda, tau, mu, number of calibration documents, domain of the calibration text. Every other setting stays
at its base. A row holds density, retained mass on the calibration text and on held-out text, KL and NLL beside dense attention on
the same items, and what calibration cost. Rows that the file holds already are not measured again; a setting that leaves heads
without any key is a row with that failure. Calibration reads the first part of each text, scoring the rest.

With --shard i/k, k processes share the settings; each writes a file of its own, and the table is of all of them. With --table
nothing is measured: the table is of the rows that OUT holds.
"""

import argparse
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from claims import add_sharing_options
from experiment import Rows, several

from attnsieve import Plan, UserError
from attnsieve.evaluation import evaluate, make_task
from attnsieve.evaluation.tasks import Task
from attnsieve.evaluation.tasks.aligned import aligned
from attnsieve.evaluation.tasks.language import Fidelity, Perplexity
from attnsieve.evaluation.text import CHARACTERS_PER_TOKEN, TextSource, text_source, token_windows
from attnsieve.fitting import fit
from attnsieve.hf import fingerprint, load_model, profile
from attnsieve.profiling import Profile, estimate_memory
from attnsieve.show import markdown, percent

# The part of a text that calibration may read; the rest is scored.
CALIBRATION_SHARE = 0.6
CALIBRATION_SEED = 1_000_003
METRICS = ("nll", "kl", "retained_mass", "output_error", "answer_nll", "exact_match", "answer_kl")


@dataclass(frozen=True)
class Setting:
    """Everything that is varied."""

    preset: str
    pcl: int
    lam: float
    tau: float
    mu: float
    documents: int
    domain: str


def main() -> None:
    arguments = parse()
    if arguments.table:
        write_table(Rows(arguments.out).all, arguments)
        return
    model, tokenizer = load_model(arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device)
    number, count = arguments.shard
    lab, stop = Lab(model, tokenizer, arguments), time.monotonic() + arguments.seconds
    for factor, setting in list(settings(arguments))[number::count]:
        if time.monotonic() < stop:
            print(line(lab.row(factor, setting)), flush=True)
    rows = [row for path in sorted(arguments.out.parent.glob(shard_file(arguments.out, "*"))) for row in Rows(path).all]
    write_table(rows, arguments)


def write_table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    text = table(sorted(rows, key=order(arguments)))
    arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def shard_file(out: Path, number: int | str) -> str:
    return f"{out.stem}-{number}{out.suffix}"


def order(arguments: argparse.Namespace) -> Callable[[dict[str, Any]], int]:
    """The order of the settings, for rows."""
    wanted = [(factor, asdict(setting)) for factor, setting in settings(arguments)]

    def place(row: dict[str, Any]) -> int:
        return next(
            (n for n, (factor, own) in enumerate(wanted) if row["factor"] == factor and own.items() <= row.items()), len(wanted)
        )

    return place


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--pcls", type=several(int), default=[128, 256, 512, 1024], help="the base is --pcl")
    parser.add_argument("--lams", type=several(float), default=[0.25, 0.5, 1.0])
    parser.add_argument("--taus", type=several(float), default=[0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--mus", type=several(float), default=[0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument(
        "--counts", type=several(int), default=[1, 4, 16, 64], help="calibration documents; the base is --documents"
    )
    parser.add_argument("--domains", type=lambda text: text.split(","), default=["text", "code", "dialogue"])
    parser.add_argument(
        "--text", default="python-docs", help="what the domain text is: a name or a file, as for attnsieve profile"
    )
    parser.add_argument("--pcl", type=int, default=512)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the scored items")
    parser.add_argument("--items", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_sharing_options(parser)
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of OUT's rows")
    parser.add_argument("--out", type=Path, required=True, help="rows go to OUT with the shard's number in its name")
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """The base, then one factor at a time."""
    base = Setting(arguments.preset, arguments.pcl, 0.5, 0.3, 0.8, arguments.documents, arguments.domains[0])
    yield "base", base
    factors = {
        "pcl": arguments.pcls,
        "lam": arguments.lams,
        "tau": arguments.taus,
        "mu": arguments.mus,
        "documents": arguments.counts,
        "domain": arguments.domains,
    }
    for factor, levels in factors.items():
        for level in levels:
            setting = replace(base, **{factor: level})
            if setting != base:
                yield factor, setting


class Lab:
    """One model: calibrates once for what several settings share, fits, scores, writes rows."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self._model, self._tokenizer, self._arguments = model, tokenizer, arguments
        self.rows = Rows(arguments.out.with_name(shard_file(arguments.out, arguments.shard[0])))
        self._calibrate = cache(self._calibrated)

    def row(self, factor: str, setting: Setting) -> dict[str, Any]:
        """The row of a setting, from the file or measured now."""
        asked = self._arguments
        key = {"model": asked.model, "factor": factor, **asdict(setting), "length": asked.length, "items": asked.items}
        found = self.rows.find(key)
        if found is not None:
            return found
        try:
            seen, cost = self._calibrate(setting.pcl, setting.documents, setting.domain)
            plan = fit(seen, preset=setting.preset, lam=setting.lam, tau=setting.tau, mu=setting.mu)
            found = {"failure": None, "calibration": cost, **self._scores(plan, setting)}
        except (UserError, torch.OutOfMemoryError) as error:
            found = {"failure": str(error)}
        return self.rows.add(key, found, self._model.device)

    def _calibrated(self, pcl: int, documents: int, domain: str) -> tuple[Profile, dict[str, Any]]:
        length = max(pcl, self._arguments.length)
        lengths = (length,) if length > pcl else ()
        source = self._part(domain, 0, CALIBRATION_SHARE)
        texts = token_windows(source, self._tokenizer, length, documents, CALIBRATION_SEED)
        start = time.perf_counter()
        seen = profile(self._model, texts, pcl=pcl, lengths=lengths, progress=False)
        cost = {
            "seconds": time.perf_counter() - start,
            "tokens": length * documents,
            "bytes_of_sums": estimate_memory(fingerprint(self._model), pcl, lengths),
        }
        return seen, cost

    def _scores(self, plan: Plan, setting: Setting) -> dict[str, Any]:
        """Held-out text of the first domain and key-value retrieval for all, the own domain's text where it is another."""
        asked = self._arguments
        first = self._part(asked.domains[0], CALIBRATION_SHARE, 1)
        tasks: list[Task] = [Perplexity(first), Fidelity(first), aligned(make_task("kv"))]
        if setting.domain != asked.domains[0]:
            tasks.append(Perplexity(self._part(setting.domain, CALIBRATION_SHARE, 1)))
        # The digest of a plan tells runs apart, so a file of evaluation rows spares dense runs that were made before.
        rows = evaluate(
            self._model,
            self._tokenizer,
            {"plan": plan},
            tasks,
            [asked.length],
            asked.items,
            progress=False,
            out=self.rows.path.with_suffix(".eval"),
        )
        found = [row for row in rows if row.plan == "plan" and row.metric in METRICS]
        return {
            "density": found[0].density,
            "retained_on_calibration": None if plan.retained is None else float(plan.retained.mean()),
            "heads": plan.provenance["heads"],
            "scores": [
                {
                    "task": row.task,
                    "variant": row.variant,
                    **{name: getattr(row, name) for name in ("metric", "value", "stderr", "dense_value")},
                    **{name: getattr(row, name) for name in ("paired_difference", "paired_stderr")},
                }
                for row in found
            ],
        }

    def _part(self, domain: str, start: float, stop: float) -> TextSource:
        """A part of a text whose whole is the same for all settings, long enough for the largest calibration set."""
        asked = self._arguments
        tokens = max([asked.documents, *asked.counts]) * max([asked.length, asked.pcl, *asked.pcls])
        return part_of(self._source(domain), start, stop, int(CHARACTERS_PER_TOKEN * tokens / CALIBRATION_SHARE))

    def _source(self, domain: str) -> TextSource:
        if domain == "text":
            return text_source(self._arguments.text)
        return {"code": code, "dialogue": dialogue}[domain]() if domain in ("code", "dialogue") else text_source(domain)


def part_of(source: TextSource, start: float, stop: float, whole: int) -> TextSource:
    """What lies between two shares of the first `whole` characters of a text."""
    text = source.read(whole)[:whole]
    part = text[int(start * len(text)) : int(stop * len(text))]
    return TextSource(f"{source.name} {start:g}-{stop:g}", lambda _: part)


def code() -> TextSource:
    """The modules of Python's standard library, one after the other."""

    def read(characters: int) -> str:
        parts: list[str] = []
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            parts.append(file.read_text(encoding="utf-8"))
            if sum(map(len, parts)) >= characters:
                break
        return "\n\n".join(parts)

    return TextSource("code", read)


def dialogue() -> TextSource:
    """Conversations about made-up topics, those of LongEval's topics task."""
    task = make_task("longeval-topics")

    def read(characters: int) -> str:
        random, parts, size = Random("ablation"), [], 0
        while size < characters:
            parts.append(task.build(random, 8).queries[0].prompt)
            size += len(parts[-1])
        return "\n\n".join(parts)

    return TextSource("dialogue", read)


def score(row: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    """A score of a row; of perplexity, the one on the text that all rows share."""
    return next((one for one in row.get("scores", []) if (one["task"], one["metric"]) == (task, metric)), {})


def table(rows: list[dict[str, Any]]) -> str:
    """Every row as a line."""
    scores = ["density %", "retained %", "KL", "NLL - dense", "kv NLL - dense"]
    return markdown(["factor", "level", "texts", *scores, "calibration s", "MiB"], [cells(row) for row in rows], left=(0, 1))


def line(row: dict[str, Any]) -> str:
    """A row while it comes."""
    return "  ".join(cells(row))


def cells(row: dict[str, Any]) -> list[str]:
    level = "" if row["factor"] == "base" else str(row[row["factor"]])
    start = [row["factor"], level, str(row["documents"])]
    if row["failure"]:
        return [*start, "-", "-", "-", "-", "-", row["failure"][:60], "-"]
    return [
        *start,
        percent(row["density"]),
        percent(score(row, "fidelity", "retained_mass").get("value")),
        f"{score(row, 'fidelity', 'kl').get('value', float('nan')):.3g}",
        difference(score(row, "perplexity", "nll")),
        difference(score(row, "kv", "answer_nll")),
        f"{row['calibration']['seconds']:.1f}",
        f"{row['calibration']['bytes_of_sums'] / 2**20:.0f}",
    ]


def difference(found: dict[str, Any]) -> str:
    if not found or found["paired_difference"] is None:
        return "-"
    return f"{found['paired_difference']:+.3g} ± {found['paired_stderr'] or 0:.2g}"


if __name__ == "__main__":
    main()
