"""Associative recall by attention layer: how many pairs each one can look up, and what a budget of w keys cannot.

    python benchmarks/mqar.py --minutes 1 --out benchmarks/results/mqar.jsonl
    python benchmarks/mqar.py --minutes 10 --seeds 3 --shapes 256x64,512x64,512x64+noise

Two layers of one head as wide as the model. As in Zoology a model is trained on rows with different numbers of pairs, here
length / 4 (the most that Zoology's rule allows), half of that and so on, and tested on each. Rows keep w = length / 2 keys, as
many as there are tokens in pairs, or length / 8, half as many as there are pairs. A model is trained with every learning rate,
and the best one counts. The first shapes come first, and two further shapes before another seed; models that the file holds
already are not trained again. On a GPU a training step is one CUDA graph, and several models are trained side by side.
Processes, one per GPU, can share the work: give them different shapes and the same file, then make the report of all rows with
--minutes 0.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment import RESULTS, Budget, Rows, Training, autocast, device_of, draw, mean_and_error, publish, written
from torch import Tensor
from tqdm.auto import tqdm

from attnsieve.errors import require
from attnsieve.nn import DmaConfig, DmaForCausalLM, RecallTask
from attnsieve.nn.mqar import IGNORED

LAYERS = ("mha", "mla", "dma", "dma-window", "nsa", "swa")
WHOLE = ("mha", "mla")  # these keep all keys
RATES = (2e-3, 4e-3)
SHAPES = "256x64,512x64,256x64+noise,1024x64,256x128,2048x64,512x64+noise,256x256,256x32"
WIDTH = 64  # models wider than this learn at lower rates, in proportion
TOKENS = 32768  # of a step at most
FEWEST = 2  # pairs of the easiest rows
CHECK_EVERY = 250  # steps between looks at the accuracy
SOLVED = 0.995


Result = tuple["Cell", dict[str, Any]]
Shape = tuple[int, int, bool]  # tokens, width, noise
Seeds = dict[int, dict[str, float]]  # accuracy by pairs


@dataclass(frozen=True)
class Cell:
    """One model. keep: keys that a row of dma, swa and nsa keeps. noise: random tokens between pairs and questions."""

    layer: str
    length: int
    width: int
    keep: int
    noise: bool
    rate: float
    seed: int
    steps: int
    batch: int
    vocabulary: int

    @property
    def task(self) -> RecallTask:
        return RecallTask(self.length, self.length // 4, self.vocabulary, noise=self.noise)

    @property
    def pairs(self) -> list[int]:
        """Of the rows of a batch in turn: the most pairs first."""
        most = self.length // 4
        return [most >> level for level in range(max(1, (most // FEWEST).bit_length()))]

    def configuration(self) -> DmaConfig:
        sizes = {"hidden_size": self.width, "intermediate_size": self.width, "num_hidden_layers": 2, "num_attention_heads": 1}
        common = {"vocab_size": self.vocabulary, "max_position_embeddings": self.length, "tie_word_embeddings": True}
        # 0.1 at 64: with 0.02 tied embeddings start so small that learning waits for them. Equal scores at every width.
        common["initializer_range"] = 0.8 / self.width**0.5
        common["qk_norm"] = False  # as in Zoology; normed heads take twice the steps to find the answers
        return DmaConfig(**sizes, **common, **self._attention())

    def _attention(self) -> dict[str, Any]:
        keep = self.keep
        return {
            "mha": {"attention": "mha"},
            "dma": {"attention": "dma", "keep_window_size": keep, "initial_A": 0.1},
            "dma-window": {"attention": "dma", "keep_window_size": keep - keep // 4, "window": keep // 4, "initial_A": 0.1},
            "swa": {"attention": "swa", "sliding_window": keep},
            "mla": {"attention": "mla", "mla_kv_rank": self.width // 2, "mla_rope_width": max(16, self.width // 4)},
            # Half of the budget in blocks of 8 (three of them fixed by the method), half in its window. Compressed blocks begin
            # every 4 tokens, two pairs, and cannot tell those apart: NSA stays at one of two where nothing else is learned.
            "nsa": {
                "attention": "nsa",
                "nsa_block": 8,
                "nsa_stride": 4,
                "nsa_selected_block": 8,
                "nsa_selected": max(4, keep // 16),
                "nsa_window": max(1, keep // 2),
            },
        }[self.layer]


KEY = tuple(field.name for field in fields(Cell))  # what tells rows of different models apart


class Recall:
    """A model that learns one cell."""

    def __init__(self, cell: Cell, device: torch.device, graph: bool) -> None:
        torch.manual_seed(cell.seed)
        self.cell, self.device, self.start = cell, device, time.monotonic()
        self.model = DmaForCausalLM(cell.configuration()).to(device).train()
        self.right = torch.zeros((), device=device)
        self.training = Training(self.model, self._loss, cell.steps, cell.rate, cell.seed, graph=graph)

    def ends(self) -> bool:
        """Whether all steps are done, or the training rows with all pairs are answered (looked at now and then)."""
        done = self.training.done
        return done >= self.cell.steps or (done % CHECK_EVERY == 0 and self.training.read(self.right) > SOLVED)

    @torch.no_grad()
    def test(self, examples: int) -> dict[str, tuple[float, float]]:
        """By the number of pairs: accuracy, and its standard error over `examples` rows."""
        self.model.eval()
        random = torch.Generator(self.device).manual_seed(2**20 + self.cell.seed)
        levels = len(self.cell.pairs)
        rows: list[list[float]] = [[] for _ in range(levels)]
        while len(rows[-1]) < examples:
            right, asked = self._right(*self._answers(*self.cell.task.sample(self.cell.batch, random, levels)))
            share = right.sum(1) / asked.sum(1)
            for level in range(levels):
                rows[level] += share[level::levels].tolist()
        self.model.train()
        return {str(pairs): mean_and_error(shares) for pairs, shares in zip(self.cell.pairs, rows, strict=True)}

    def _loss(self, random: torch.Generator) -> Tensor:
        levels = len(self.cell.pairs)
        predicted, wanted = self._answers(*self.cell.task.sample(self.cell.batch, random, levels))
        right, asked = self._right(predicted, wanted)
        self.right.lerp_(right[::levels].sum() / asked[::levels].sum(), 0.05)
        losses = F.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return (
            losses.view_as(wanted).sum(1) / asked.sum(1)
        ).mean()  # rows with few pairs count as much, or nothing is learned at first

    def _right(self, predicted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B, pairs]: answered rightly; asked at all."""
        asked = wanted != IGNORED
        return (predicted.argmax(-1) == wanted) & asked, asked

    def _answers(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, pairs, vocabulary] where values are asked for, and the values; IGNORED in rows with fewer pairs."""
        places = (labels[:, 1:] != IGNORED).int().topk(self.cell.pairs[0], dim=1).indices
        with autocast(self.device):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))
        return logits.float(), labels[:, 1:].gather(1, places)


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
                yield one.cell, _numbers(one, arguments.test_examples)
    for one in active:
        yield one.cell, _numbers(one, arguments.test_examples) | {"finished": False}


def _numbers(one: Recall, examples: int) -> dict[str, Any]:
    torch.cuda.synchronize() if one.device.type == "cuda" else None
    seconds = time.monotonic() - one.start
    found = one.test(examples)
    numbers: dict[str, Any] = {"accuracy": {pairs: value for pairs, (value, _) in found.items()}}
    numbers["stderr"] = {pairs: error for pairs, (_, error) in found.items()}
    numbers |= {
        "finished": True,
        "trained_steps": one.training.done,
        "seconds": round(seconds, 2),
        "cuda_graph": one.training.graph is not None,
    }
    numbers |= {"parameters": sum(parameter.numel() for parameter in one.model.parameters())}
    if one.cell.layer.startswith("dma"):
        numbers["A"] = [layer.self_attn.A.tolist() for layer in one.model.model.layers]
    return numbers


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Models in the order of what they tell; layers that stand beside each other are trained together."""
    fixed = {"steps": arguments.steps, "vocabulary": arguments.vocabulary}
    found = []
    for place, (length, width, noise) in enumerate(arguments.shapes):
        shape = {"length": length, "width": width, "noise": noise}
        batch, levels = min(arguments.batch, TOKENS // length), (length // 4 // FEWEST).bit_length()
        require(batch >= levels, f"a batch of {batch} rows of {length} tokens cannot hold {levels} numbers of pairs")
        for seed in range(arguments.seeds):
            for rate in arguments.rates:
                one = partial(Cell, rate=rate * min(1.0, WIDTH / width), seed=seed, batch=batch, **fixed, **shape)
                for layer in arguments.layers.split(","):
                    parts = [1] if layer in WHOLE else arguments.parts
                    found += [(place + 2 * seed, one(layer, keep=length // part)) for part in parts]
    return [cell for _, cell in sorted(found, key=lambda one: one[0])]


def shapes(text: str) -> list[tuple[int, int, bool]]:
    """ "256x64+noise" to (256 tokens, width 64, True), of several with commas between them."""
    found = re.findall(r"(\d+)x(\d+)(\+noise)?(?:,|$)", text)
    if ",".join(f"{length}x{width}{noise}" for length, width, noise in found) != text:
        raise argparse.ArgumentTypeError(f"expected shapes like 256x64,512x64+noise, got {text!r}")
    return [(int(length), int(width), bool(noise)) for length, width, noise in found]


def told(cell: Cell, numbers: dict[str, Any]) -> str:
    """One line."""
    shape = f"{cell.length} tokens, w {cell.keep}, d {cell.width}{', noise' if cell.noise else ''}"
    run = f"{numbers['trained_steps']} steps, {numbers['seconds']} s{'' if numbers['finished'] else ', out of time'}"
    accuracy = ", ".join(f"{pairs}: {value:.3f}" for pairs, value in numbers["accuracy"].items())
    return f"{cell.layer:10} {shape}, lr {cell.rate:g}, seed {cell.seed}: accuracy by pairs {accuracy} ({run})"


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy by layer, share of keys kept and pairs: the best learning rate of every seed, mean over seeds."""
    finished = [row for row in rows if row["finished"]]
    best: dict[Shape, dict[str, Seeds]] = {}
    for row in finished:
        shape = row["length"], row["width"], row["noise"]
        of_seed = best.setdefault(shape, {}).setdefault(method(row), {})
        earlier = of_seed.get(row["seed"], {})
        if not earlier or sum(row["accuracy"].values()) > sum(earlier.values()):
            of_seed[row["seed"]] = row["accuracy"]
    methods = sorted({method(row) for row in finished}, key=lambda name: (LAYERS.index(name.split(",")[0]), name))
    body, panels, marks = [], {}, {}
    for (length, width, noise), found in sorted(best.items()):
        for pairs in pairs_of(found):
            values = [written(at(found.get(name, {}), pairs)) for name in methods]
            body.append([*map(str, (length, width, noise, pairs)), *values])
        for part in sorted({name.partition(", ")[2] for name in found} - {""}):
            name = f"{length} tokens, d {width}, {part}{', noise' if noise else ''}"
            some = {layer: seeds for layer, seeds in found.items() if layer.partition(", ")[2] in ("", part)}
            panels[name] = {layer.partition(",")[0]: curve(seeds, pairs_of(found)) for layer, seeds in some.items()}
            panels[name]["any value of the row"] = [(float(pairs), 1 / pairs, 0.0) for pairs in pairs_of(found)]
            keep = length // int(part.partition("/")[2])
            marks |= {name: keep} if keep <= max(pairs_of(found)) else {}
    notes = "Share of asked values that are the most likely token; w of the n tokens a row; best of the learning rates."
    notes += f" Seeds: {len({row['seed'] for row in finished})}."
    done, begun = ({tuple(row[name] for name in KEY) for row in some} for some in (finished, rows))
    cut = len(begun - done)
    notes += f" {cut} of {len(begun)} models ran out of time before their last step and are left out." if cut else ""
    publish(path, "Associative recall", ["tokens", "width", "noise", "pairs", *methods], body, notes)
    if panels:  # none where all layers keep all keys
        draw(path, panels, "pairs (dashed: w)", "accuracy", marks=marks)


def pairs_of(found: dict[str, Seeds]) -> list[int]:
    """All numbers of pairs."""
    return sorted({int(pairs) for seeds in found.values() for accuracy in seeds.values() for pairs in accuracy})


def at(seeds: Seeds, pairs: int) -> list[float]:
    """Accuracy of each seed at this number of pairs."""
    return [accuracy[str(pairs)] for accuracy in seeds.values()]


def curve(seeds: Seeds, pairs: list[int]) -> list[tuple[float, float, float]]:
    """(pairs, mean, standard error over the seeds)."""
    return [(float(some), *mean_and_error(at(seeds, some))) for some in pairs]


def method(row: dict[str, Any]) -> str:
    """ "dma, w = n/8": the layer and the share of the keys that its rows keep."""
    part = row["length"] // row["keep"]
    return str(row["layer"]) if part == 1 else f"{row['layer']}, w = n/{part}"


def parse() -> argparse.Namespace:
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="models are tested as they stand after this; 0: report only")
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help=f"tokens x width, default {SHAPES}")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--parts", type=numbers, default=[2, 8], help="2,8: rows keep a half and an eighth of the tokens")
    parser.add_argument("--seeds", type=int, default=1)
    rates = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--rates", type=rates, default=list(RATES), help=f"learning rates, up to a width of {WIDTH}")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of a step, fewer where {TOKENS} tokens are less")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--test-examples", type=int, default=256, help="rows of each number of pairs")
    parser.add_argument("--together", type=int, default=9, help="models that are trained side by side")
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
