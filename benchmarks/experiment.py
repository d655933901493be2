"""What the experiment scripts share: rows measured once and written as they come, a time budget, and the report made of them."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from health import Health
from torch import Tensor, nn

from attnsieve.device import device_name
from attnsieve.environment import environment
from attnsieve.show import markdown
from attnsieve.show.canvas import COLOURS, GREY, MARKERS, new_figure, quiet_axes, save

RESULTS = Path(__file__).parent / "results"
Loss = Callable[[torch.Generator], Tensor]
# Method -> (x, mean, standard error) of each point.
Curves = Mapping[str, Sequence[tuple[float, float, float]]]


class Rows:
    """A file of JSON lines. `key` says what was measured; a row with an equal key is not measured again.

    Processes may add rows to one file at the same time; `all` are those that were there at first and this one's own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all = self.read()

    def read(self) -> list[dict[str, Any]]:
        """All rows that the file holds now."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of this measurement, if there is one."""
        return next((row for row in self.all if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, key: Mapping[str, Any], numbers: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write a row now."""
        row = {**key, **numbers, "device": device_name(device), **environment()}
        self.all.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
            file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        return row


@dataclass
class Budget:
    """Minutes that a command may take from now on."""

    minutes: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.start + 60 * self.minutes - time.monotonic()


class Training:
    """A model, its optimizer and a schedule. `step` never waits for the device; with `graph` it replays one CUDA graph.

    loss: gives the loss of the next batch, drawn with the generator it is given. AdamW, weight decay 0.1 on matrices, gradients
    clipped to norm 1; the learning rate rises for 2 % of the steps and falls to 0 in the last share `falling`: late, as sudden
    learning may come late.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, steps: int, rate: float, seed: int, *, graph: bool = True, falling: float = 0.3
    ) -> None:
        device = next(model.parameters()).device
        self.falling = falling
        self.model, self.loss, self.steps, self.peak, self.done = model, loss, steps, rate, 0
        self.health = Health(model)
        self.random = torch.Generator(device).manual_seed(seed)
        self.rate = torch.zeros((), device=device)
        self.last = torch.zeros((), device=device)
        gpu = device.type == "cuda"
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        options = {"fused": True, "capturable": True} if gpu else {}
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), **options)
        self.stream = torch.cuda.Stream() if gpu else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.graph = self._captured() if graph and gpu else None

    def step(self) -> None:
        """One optimizer step; nothing on a CPU once numbers are not finite, as its DMA layers refuse NaN."""
        if self.stream is None and self.diverged:
            self.done += 1
            return
        rising, falling = (self.done + 1) / (0.02 * self.steps + 1), (self.steps - self.done) / (self.falling * self.steps)
        with torch.cuda.stream(self.stream):
            self.rate.fill_(self.peak * min(1.0, rising, falling))
            if self.graph is None:
                self._update()
            else:
                self.graph.replay()
        self.done += 1

    @property
    def diverged(self) -> bool:
        """Whether the last loss or a parameter is NaN or infinite. Waits for the device."""
        with torch.cuda.stream(self.stream):
            return not all(bool(numbers.isfinite().all()) for numbers in (self.last, *self.model.parameters()))

    def look(self) -> None:
        """Write down what the row will tell of this step. Waits for the device."""
        with torch.cuda.stream(self.stream):
            self.health.look()

    def read(self, number: Tensor) -> float:
        """A number that the loss function or `last` (the last loss) holds. Waits for the device."""
        with torch.cuda.stream(self.stream):
            return float(number)

    def _update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.random)
        loss.backward()
        self.health.clip(loss)
        self.optimizer.step()
        self.last.copy_(loss.detach())

    def _captured(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            for _ in range(3):  # compiles kernels, makes the optimizer's state; the learning rate is 0
                self._update()
        torch.cuda.synchronize()
        self.health.restart()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.random)
        with torch.cuda.graph(graph, stream=self.stream):
            self._update()
        return graph


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an argument with commas between its parts, each read by `kind`."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; without the cache of weights, which a graph must not keep."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def device_of(name: str) -> torch.device:
    """auto: the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in use on a GPU since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; 0 for one value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def written(values: Sequence[float], digits: int = 3) -> str:
    """ "0.812 ± 0.010", "0.812" for one value, "-" for none."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def measure_and_report(
    arguments: Namespace, measure: Callable[[Namespace, Rows], None], report: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    """Add rows to `arguments.out`, with --minutes 0 none, and report all that it holds then."""
    rows = Rows(arguments.out)
    if arguments.minutes:
        measure(arguments, rows)
    if found := rows.read():
        report(arguments.out, found)


def publish(path: Path, title: str, header: Sequence[str], cells: Iterable[Sequence[str]], notes: str = "") -> None:
    """A Markdown file beside the rows."""
    table = markdown(header, list(cells))
    text = f"# {title}\n\n{notes}\n\n{table}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(table)


def draw(
    path: Path,
    panels: Mapping[str, Curves],
    x: str,
    y: str,
    *,
    log: bool = True,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> None:
    """One panel of curves per name; `marks`: panel -> an x to point out. Same colour for the same method everywhere."""
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed; run the command again where it is")
        return
    methods = list(dict.fromkeys(method for curves in panels.values() for method in curves))
    columns, lines = min(len(panels), 4), -(-len(panels) // 4)
    figure = new_figure(3.2 * max(columns, 2), 3.2 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    for panel, (name, curves) in zip(axes, panels.items(), strict=False):
        quiet_axes(panel)
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_xlabel(x, fontsize=9)
        if log:
            panel.set_xscale("log", base=2)
        if log_y:
            panel.set_yscale("log")
        if marks and name in marks:
            panel.axvline(marks[name], color=GREY, linewidth=1, linestyle="--")
        for method, points in curves.items():
            place = methods.index(method)
            points = list(zip(*sorted(points), strict=True))
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            style["linestyle"] = "-" if place < len(COLOURS) else ":"  # colours come again
            panel.errorbar(*points, **style, linewidth=1.2, capsize=2, label=method)
    for first in grid[:, 0]:
        first.set_ylabel(y, fontsize=9)
    handles = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    print(save(figure, path.with_suffix(".png")))
