"""Associative recall by attention layer: how many pairs each one can look up, and what a budget of w keys cannot.

    python benchmarks/mqar.py --minutes 1 --out benchmarks/results/mqar.jsonl
    python benchmarks/mqar.py --minutes 10 --seeds 3 --shapes 256x64,512x64,512x128x4,512x64+noise

Two layers of attention (tokens x width, of one head or as many as the shape says) behind a convolution of two tokens, as Zoology
puts a short one before every mixer: a value's token then knows its key, and attention has only to find it. Without it every
layer must first learn to look one token back, and most models never did (docs/LOG.md); --no-convolution does that.

As in Zoology a model is trained on rows with different numbers of pairs, here length / 4 (the most that Zoology's rule allows),
half of that and so on, and tested on each. Rows keep w = length / 2 keys, twice as many as there are pairs, or length / 8, half
as many. A model is trained with every learning rate, and the best one counts. The first shapes come first, and all seeds of a
shape before the next; models that the file holds already are not trained again. On a GPU a training step is one CUDA graph, and
several models are trained side by side. Processes, one per GPU, can share the work: give them different shapes and the same file,
then make the report of all rows with --minutes 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment import RESULTS, Budget, Rows, Training, autocast, device_of, mean_and_error, several
from mqar_cells import RECIPE, SHAPES, TOKENS, Cell, cells, shapes
from mqar_report import LAYERS, named, report
from torch import Tensor, nn
from tqdm.auto import tqdm

from attnsieve.nn import DmaForCausalLM
from attnsieve.nn.mqar import IGNORED

CHECK_EVERY = 100  # steps between looks at the accuracy
SOLVED = 0.99


Result = tuple[Cell, dict[str, Any]]


class Reader(nn.Module):
    """The decoder of a cell behind the convolution."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.decoder = DmaForCausalLM(cell.configuration())
        self.previous = nn.Linear(cell.width, cell.width, bias=False) if cell.convolution else None

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, width] of ids [B, T]."""
        tokens = self.decoder.model.embed_tokens(ids)
        if self.previous is not None:
            tokens = tokens + self.previous(F.pad(tokens, (0, 0, 1, 0))[:, :-1])
        hidden: Tensor = self.decoder.model(inputs_embeds=tokens, use_cache=False).last_hidden_state
        return hidden


class Recall:
    """A model that learns one cell."""

    def __init__(self, cell: Cell, device: torch.device, graph: bool) -> None:
        torch.manual_seed(cell.seed)
        self.cell, self.device, self.start = cell, device, time.monotonic()
        self.model = Reader(cell).to(device).train()
        self.right = torch.zeros((), device=device)
        counts = torch.tensor(cell.counts, device=device)
        # Row and rank of every question of a batch: logits are made for these only.
        self.row, self.rank = (torch.arange(cell.pairs[0], device=device) < counts[:, None]).nonzero(as_tuple=True)
        self.share = 1 / counts[self.row]
        options = {"graph": graph, "falling": RECIPE.falling}
        self.training = Training(self.model, self._loss, cell.steps, cell.rate, cell.seed, **options)

    def ends(self) -> bool:
        """Whether all steps are done, or (looked at now and then) the training rows with all pairs answered, or out of reach."""
        done = self.training.done
        if done >= self.cell.steps:
            return True
        if done % CHECK_EVERY:
            return False
        if self.training.read(self.right) > SOLVED or self.training.diverged:
            return True
        self.training.look()
        return False

    @torch.no_grad()
    def test(self, examples: int) -> dict[str, tuple[float, float]]:
        """By the number of pairs: accuracy, and its standard error over `examples` rows."""
        self.model.eval()
        random = torch.Generator(self.device).manual_seed(2**20 + self.cell.seed)
        levels = len(self.cell.pairs)
        rows: list[list[float]] = [[] for _ in range(levels)]
        while len(rows[-1]) < examples:
            share = self._by_row(*self._answers(random))
            for level in range(levels):
                rows[level] += share[level::levels].tolist()
        self.model.train()
        return {str(pairs): mean_and_error(shares) for pairs, shares in zip(self.cell.pairs, rows, strict=True)}

    def _loss(self, random: torch.Generator) -> Tensor:
        predicted, wanted = self._answers(random)
        self.right.lerp_(self._by_row(predicted, wanted)[:: len(self.cell.pairs)].mean(), 0.05)
        # Rows with few pairs count as much as the others, or nothing is learned at first.
        return (F.cross_entropy(predicted, wanted, reduction="none") * self.share).sum() / self.cell.batch

    def _by_row(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Share of right answers of each row."""
        right = (predicted.argmax(-1) == wanted) * self.share
        return torch.zeros(self.cell.batch, device=self.device).index_add_(0, self.row, right)

    def _answers(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits [questions, vocabulary] and values [questions] of a new batch."""
        ids, labels = self.cell.task.sample(self.cell.batch, random, len(self.cell.pairs))
        asked = (labels[:, 1:] != IGNORED).int().topk(self.cell.pairs[0], dim=1).indices[self.row, self.rank]
        with autocast(self.device):
            hidden = self.model(ids).flatten(0, 1).index_select(0, self.row * ids.shape[1] + asked)
            logits = self.model.decoder.lm_head(hidden)
        return logits.float(), labels[self.row, asked + 1]


def train_all(cells: Iterable[Cell], device: torch.device, arguments: argparse.Namespace, budget: Budget) -> Iterator[Result]:
    """Train cells in this order, `together` at a time; the numbers of each as it ends, or as it stands when the time is over."""
    waiting, active = iter(cells), []
    with tqdm(desc="train", unit="step", leave=False, disable=None) as bar:
        while budget.left > 0:
            for cell in islice(waiting, arguments.together - len(active)):
                active.append(Recall(cell, device, not arguments.no_graph))
            if not active:
                return
            for one in active:
                for _ in range(min(10, one.cell.steps - one.training.done)):
                    one.training.step()
                    bar.update()
            for one in [one for one in active if one.ends()]:
                active.remove(one)
                yield one.cell, _numbers(one, arguments.test_examples, finished=True)
    for one in active:
        yield one.cell, _numbers(one, arguments.test_examples, finished=False)


def _numbers(one: Recall, examples: int, *, finished: bool) -> dict[str, Any]:
    """Of a row. A model with NaN answers nothing and is done: `diverged`, without what JSON cannot hold."""
    torch.cuda.synchronize() if one.device.type == "cuda" else None
    seconds = time.monotonic() - one.start
    diverged = one.training.diverged
    found = dict.fromkeys(map(str, one.cell.pairs), (0.0, 0.0)) if diverged else one.test(examples)
    numbers: dict[str, Any] = {"accuracy": {pairs: value for pairs, (value, _) in found.items()}}
    numbers["stderr"] = {pairs: error for pairs, (_, error) in found.items()}
    numbers |= {
        "finished": finished or diverged,  # what is not finite needs no more steps
        "trained_steps": one.training.done,
        "seconds": round(seconds, 2),
        "cuda_graph": one.training.graph is not None,
    }
    numbers |= {"parameters": sum(parameter.numel() for parameter in one.model.parameters())}
    one.training.look()
    numbers |= one.training.health.told(diverged=diverged)
    if not diverged and one.cell.layer.startswith("dma"):
        numbers["A"] = [layer.self_attn.A.tolist() for layer in one.model.decoder.model.layers]
    return numbers


def told(cell: Cell, numbers: dict[str, Any]) -> str:
    """One line."""
    run = f"{numbers['trained_steps']} steps, {numbers['seconds']} s{'' if numbers['finished'] else ', out of time'}"
    run += f", diverged at step {numbers['diverged_at']}" if "diverged" in numbers else ""
    accuracy = ", ".join(f"{pairs}: {value:.3f}" for pairs, value in numbers["accuracy"].items())
    shape = f"{named(asdict(cell))}, w {cell.keep}, lr {cell.rate:g}, seed {cell.seed}"
    return f"{cell.layer:10} {shape}: accuracy by pairs {accuracy} ({run})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="models are tested as they stand after this; 0: report only")
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help=f"tokens x width x heads, default {SHAPES}")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--parts", type=several(int), default=[2, 8], help="2,8: rows keep a half and an eighth of the tokens")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=several(float), default=[RECIPE.rate], help="learning rates")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of a step, fewer where {TOKENS} tokens are less")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--test-examples", type=int, default=256, help="rows of each number of pairs")
    parser.add_argument("--together", type=int, default=9, help="models that are trained side by side")
    parser.add_argument("--no-convolution", action="store_true", help="layers learn to look one token back by themselves")
    parser.add_argument("--no-graph", action="store_true", help="launch every operation instead of CUDA graphs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "mqar.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    rows, budget, device = Rows(arguments.out), Budget(arguments.minutes), device_of(arguments.device)
    missing = [cell for cell in cells(arguments) if rows.find(asdict(cell) | {"finished": True}) is None]
    trained = 0
    for cell, numbers in train_all(missing, device, arguments, budget):
        rows.add(asdict(cell), numbers, device)
        trained += numbers["finished"]
        print(told(cell, numbers), flush=True)
    if arguments.minutes:
        print(f"{len(missing) - trained} of {len(missing)} models not trained to the end")
    if found := rows.read():
        report(arguments.out, found)


if __name__ == "__main__":
    main()
