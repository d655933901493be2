"""Accuracy against density on real models: published methods, single keys, DAM's presets, and plans fitted to a budget.

    python benchmarks/pareto.py smollm2-135m --lengths 1024,2048 --items 8 --out pareto/
    python benchmarks/fleet.py --gpus 4 --each 4 --seconds 330 -- \\
        python benchmarks/pareto.py small.gguf large.gguf --lengths 1024,4096 --items 32,16 --shard {shard} --out pareto/
    python benchmarks/pareto_figures.py pareto/

Plans are made per model and length, on texts with other seeds than the scored ones, and kept under --out. Items are aligned
(equal numbers of tokens), so that they run as batches. Any number of processes may share --out: each piece of work is claimed by
one of them. Rows are written as they come, and runs that a file there holds already are not repeated.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from claims import Board, add_sharing_options
from pareto_plans import GROUPS, Shelf, Workshop, railed, summary
from pareto_tasks import kept, task_of

from attnsieve import Plan, UserError
from attnsieve.evaluation.compare import Runs
from attnsieve.evaluation.ledger import Cell, plan_digest
from attnsieve.evaluation.rows import Row
from attnsieve.evaluation.tasks.aligned import MANY
from attnsieve.hf import load_model

WAIT = 0.5
# How often a run is tried on a GPU that other processes fill for a moment, and seconds in between.
TRIES, PAUSE = 4, 8.0
PRINTED = {"exact_match": "right", "answer_nll": "NLL", "answer_kl": "KL", "kl": "KL", "topic_match": "right"}


def main() -> None:
    arguments = parse()
    number, count = arguments.shard
    stop = time.monotonic() + arguments.seconds
    for name in rotated(arguments.models, number % len(arguments.models) / len(arguments.models)):
        if time.monotonic() < stop:
            work([Worker.of(name, arguments)], stop)
            print(f"shard {number} of {count}: {name} ended with {max(0.0, stop - time.monotonic()):.0f} s left", flush=True)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--lengths", type=whole_numbers, default=[1024, 2048])
    parser.add_argument("--items", type=whole_numbers, default=[8], help="documents per task, for all lengths or for each")
    parser.add_argument("--tasks", type=names, default=list(MANY))
    parser.add_argument("--only", type=names, default=[""], help="plans' names, or starts of names; dense is always there")
    parser.add_argument("--first", type=names, default=[""], help="names, or starts, of plans to run before others")
    parser.add_argument(
        "--railed", type=names, default=[], help="names, or starts, of plans to run with all keys for rows that ask, too"
    )
    parser.add_argument("--groups", type=names, default=list(GROUPS))
    parser.add_argument("--longest", type=names, default=[], help="MODEL=LENGTH: leave out what is longer")
    parser.add_argument("--text", default="python-docs", help="the plain text to calibrate on")
    parser.add_argument("--calibration", type=int, default=2, help="texts of each kind to calibrate on")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_sharing_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    found = parser.parse_args(given)
    found.items = found.items * len(found.lengths) if len(found.items) == 1 else found.items
    if len(found.items) != len(found.lengths):
        parser.error("--items needs one number, or one for each length")
    return found


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return text.split(",")


def rotated(things: list[Any], share: float) -> list[Any]:
    """Processes begin at different places, so that they compile different kernels and seldom want the same piece."""
    start = int(share * len(things))
    return things[start:] + things[:start]


def work(workers: Sequence["Worker"], stop: float) -> None:
    """Piece by piece, always the first that any of them has, until all is done or claimed or the time is over."""
    while time.monotonic() < stop:
        if any(worker.step() for worker in workers):
            continue
        if all(worker.whole() for worker in workers):
            return
        time.sleep(WAIT)  # Others make plans.


@dataclass
class Worker:
    """One model's part in a process. done: runs that the folder held at the start. share: the process's number over that of all."""

    name: str
    runs: Runs
    workshop: Workshop
    shelf: Shelf
    board: Board
    cells: list[Cell]
    done: set[tuple[Any, ...]]
    arguments: argparse.Namespace
    share: float

    @classmethod
    def of(cls, name: str, arguments: argparse.Namespace) -> "Worker":
        (number, count), out, label = arguments.shard, arguments.out, Path(name).stem
        rows = out / f"rows-{number}.jsonl"
        model, tokenizer, runs = opened(name, arguments.dtype, arguments.device, rows, count == 1)
        longest = dict(part.split("=") for part in arguments.longest)
        sizes = [
            pair for pair in zip(arguments.lengths, arguments.items, strict=True) if pair[0] <= int(longest.get(label, pair[0]))
        ]
        tasks = [kept(task_of(task), out / "items" / label) for task in arguments.tasks]
        cells = [Cell(task, length, items, 0) for task in tasks for length, items in sizes]
        measured = out / "measured" / label
        workshop = Workshop(model, tokenizer, tuple(MANY), arguments.text, arguments.calibration, measured)
        done = {run_of(row) for row in join(out)}
        board, shelf, share = Board(out / "claims"), Shelf(out / "plans" / label), number / count
        return cls(label, runs, workshop, shelf, board, rotated(cells, share), done, arguments, share)

    def step(self) -> bool:
        """Make plans that nobody makes, or else run the first that nobody ran; whether there was one."""
        if any(self._fit(*group) for group in self._groups()):
            return True
        starts = [self.arguments.first] if self.arguments.first == [""] else [self.arguments.first, [""]]
        return any(self._cell(cell, start) for start in starts for cell in self.cells)

    def whole(self) -> bool:
        """Whether all plans are made."""
        return all(self.shelf.has(*group) for group in self._groups())

    def _groups(self) -> list[tuple[int, str]]:
        lengths = sorted({cell.length for cell in self.cells}, reverse=True)
        return [(length, group) for length in lengths for group in self.arguments.groups]

    def _fit(self, length: int, group: str) -> bool:
        """Whether this process made the plans."""
        piece = f"{self.name} {self.arguments.dtype} plans {length} {group}"
        if self.shelf.has(length, group) or not self.board.claim(piece):
            return False
        start = time.monotonic()
        try:
            plans = GROUPS[group](self.workshop, length)
        except (UserError, RuntimeError) as error:
            print(f"{self.name} {length} {group}: {type(error).__name__}: {error}", flush=True)
            plans = {}
        self.shelf.put(length, group, plans)
        print(f"{self.name} {length}: {len(plans)} plans of {group} in {time.monotonic() - start:.1f} s", flush=True)
        return True

    def _cell(self, cell: Cell, starts: list[str]) -> bool:
        """Run one of the plans at hand that nobody has run on this cell; whether there was one."""
        ready = tuple(group for group in self.arguments.groups if self.shelf.has(cell.length, group))
        plans = plans_at(self.shelf, cell.length, ready, tuple(self.arguments.railed))
        wanted = meant(meant(plans, self.arguments.only), starts)
        return any(self._try(cell, name, *plans[name]) for name in rotated(wanted, self.share))

    def _try(self, cell: Cell, name: str, plan: Plan, digest: str) -> bool:
        """Whether this process got the run."""
        key = (self.name, self.arguments.dtype, digest, cell.task.name, cell.task.variant, cell.length, cell.items)
        piece = f"{self.name} {self.arguments.dtype} {cell.task.name} {cell.length} {cell.items} {name}"
        if key in self.done or not self.board.claim(piece):
            return False
        if self._run(cell, name, plan):
            self.board.finish(piece)
        return True

    def _run(self, cell: Cell, name: str, plan: Plan) -> bool:
        """Whether it went well."""
        start = time.monotonic()
        try:
            rows = [row for row in patiently(lambda: self.runs.cell(cell, {name: plan})) if row.plan == name]
        except (UserError, RuntimeError) as error:
            print(f"{self.name} {cell.task.name} {cell.length} {name}: {type(error).__name__}: {error}", flush=True)
            return False
        found = {PRINTED[row.metric]: row for row in rows if row.metric in PRINTED}
        numbers = "  ".join(f"{short} {row.value:.3f} ({row.dense_value:.3f})" for short, row in found.items())
        seconds = time.monotonic() - start
        print(
            f"{self.name} {cell.task.name} {cell.length} {name}: {rows[0].density:.3f}  {numbers}  {seconds:.1f} s", flush=True
        )


def patiently(run: Callable[[], list[Row]]) -> list[Row]:
    """What `run` returns, tried again where memory ran out; memory that it no longer needs is there for other processes."""
    for _ in range(TRIES - 1):
        try:
            return run()
        except torch.OutOfMemoryError:
            pass  # The error holds the tensors of the failed call until here.
        finally:
            torch.cuda.empty_cache()
        time.sleep(PAUSE)
    return run()


@cache
def opened(name: str, dtype: str, device: str, rows: Path, progress: bool) -> tuple[Any, Any, Runs]:
    """A model, its tokenizer and its runs, which remember dense attention's: one for all that a process does with it."""
    model, tokenizer = load_model(name, dtype=getattr(torch, dtype), device=device)
    return model, tokenizer, Runs(model, tokenizer, rows, progress=progress)


@cache
def plans_at(shelf: Shelf, length: int, groups: tuple[str, ...], rails: tuple[str, ...]) -> dict[str, tuple[Plan, str]]:
    """The plans of groups that are made, those that `rails` means also with rails, and their digests."""
    plans = {name: plan for group in groups for name, plan in shelf.get(length, group).items()}
    return {name: (plan, plan_digest(plan)) for name, plan in plans_with_rails(plans, rails).items()}


def plans_with_rails(plans: dict[str, Plan], rails: tuple[str, ...]) -> dict[str, Plan]:
    """`plans`, and those that `rails` means with rails."""
    return plans | railed({name: plans[name] for name in meant(plans, rails)})


def meant(names: Iterable[str], starts: Sequence[str]) -> list[str]:
    """The names that stand among `starts`, and those that begin with one that is no name itself."""
    names = list(names)
    open_ends = tuple(start for start in starts if start not in names)
    return [name for name in names if name in starts or name.startswith(open_ends)]


def run_of(row: Row) -> tuple[Any, ...]:
    return row.model, row.dtype, row.plan_digest, row.task, row.variant, row.length, row.items


def join(folder: Path) -> list[Row]:
    """Every run of a folder once. A line that another process is writing, or was when it was ended, is left out."""
    runs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for path in sorted(folder.glob("rows*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):  # texts in rows may hold other separators
            row = whole_row(line)
            if row is not None:
                runs.setdefault(row.run, {})[row.metric] = row
    return [row for run in runs.values() for row in run.values()]


def whole_row(line: str) -> Row | None:
    try:
        return Row(**json.loads(line))
    except ValueError:
        return None


def plans_of(folder: Path, names: set[str]) -> list[str]:
    """A JSON line about every plan of a folder with one of these names."""
    return [
        summary(model.name, int(length.name), name, plan)
        for model in sorted((folder / "plans").glob("*"))
        for length in sorted(path for path in model.iterdir() if path.name.isdigit())
        for group in sorted(path for path in length.iterdir() if path.name in GROUPS)
        for plans in [Shelf(model).get(int(length.name), group.name)]
        for name, plan in (plans | railed(plans)).items()
        if name in names
    ]


if __name__ == "__main__":
    main()
