"""Figures from benchmark rows: python benchmarks/figures.py benchmarks/results/kernels.jsonl --out docs/figures

speed-up over the fastest dense kernel against density, with the ideal line (skipped work costs nothing); speed-up against length,
both of the shape with the most rows; time to first token and peak memory. Repeated measurements: the last one counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attnsieve.bench.rows import read
from attnsieve.show.canvas import COLOURS, GREY, MARKERS, new_figure, quiet_axes, save

OPS = {"prefill": "prefill", "decode": "decode, one query", "forward_backward": "forward and backward"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", default="svg", choices=["svg", "png", "pdf"])
    arguments = parser.parse_args()
    rows = newest(read(arguments.rows))
    for op in OPS:
        sparse = of_one_shape([row for row in rows if row["op"] == op and row["speedup"] and row["density"] < 1])
        if sparse:
            print(save(by_density(sparse, OPS[op]), arguments.out / f"{op}-by-density.{arguments.format}"))
            print(save(by_length(sparse, OPS[op]), arguments.out / f"{op}-by-length.{arguments.format}"))
    whole = [row for row in rows if row["op"] == "ttft" and row["ms_p50"] is not None]
    if whole:
        print(save(first_token(whole), arguments.out / f"ttft.{arguments.format}"))


def newest(rows: list[dict]) -> list[dict]:
    """Of rows that measured the same thing with everything built before, the last."""
    names = ("op", "backend", "mask", "shape", "device", "q_len", "kv_len", "batch", "dtype")
    built = [row | {"backend": row["backend"].removeprefix("auto: ")} for row in rows if not row["includes_mask_building"]]
    return list({tuple(row[name] for name in names): row for row in built}.values())


def of_one_shape(rows: list[dict]) -> list[dict]:
    """Those of the shape that was measured most."""
    shapes = [row["shape"] for row in rows]
    return [row for row in rows if row["shape"] == max(shapes, key=shapes.count)]


def by_density(rows: list[dict], title: str):
    """One panel per length, one colour per kind of mask, one mark per backend; hollow where a KV group shares the mask."""
    lengths = sorted({row["kv_len"] for row in rows})
    backends, kinds = sorted({row["backend"] for row in rows}), sorted({kind_of(row["mask"]) for row in rows})
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    mark = {backend: MARKERS[i % len(MARKERS)] for i, backend in enumerate(backends)}
    figure = new_figure(3.0 * len(lengths) + 1.6, 3.2)
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for panel, n in zip(panels, lengths, strict=True):
        ideal_line(panel, [row["density"] for row in rows if row["kv_len"] == n])
        for row in (row for row in rows if row["kv_len"] == n):
            own = colour[kind_of(row["mask"])]
            style = {"mfc": "none"} if row["mask"].endswith("+") else {}
            panel.plot(row["density"], row["speedup"], mark[row["backend"]], color=own, ms=5, **style)
        panel.set(xscale="log", yscale="log", xlabel="density", xlim=(0.01, 1.2))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(f"{n // 1024}K keys", fontsize=9)
        quiet_axes(panel)
    panels[0].set_ylabel("speed-up over the fastest dense kernel")
    keys = [panels[0].plot([], [], "s", color=colour[kind], label=kind)[0] for kind in kinds]
    keys += [panels[0].plot([], [], mark[name], color=GREY, label=name)[0] for name in backends]
    figure.legend(handles=keys, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{title}, {rows[0]['shape']}, {rows[0]['device']}", fontsize=10)
    return figure


def kind_of(mask: str) -> str:
    """blocks-10 and blocks-5 are of one kind; patterns are called by their last atom."""
    return mask.split("|")[-1].split("(")[0].split("-")[0].rstrip("+").strip()


def ideal_line(panel, densities: list[float]) -> None:
    ends = [min(densities) * 0.8, 1.0]
    panel.plot(ends, [1 / density for density in ends], color=GREY, lw=1, ls="--", zorder=0)
    panel.axhline(1, color=GREY, lw=0.6, zorder=0)
    panel.annotate("ideal", (ends[0], 1 / ends[0]), fontsize=7, color=GREY, ha="left", va="bottom")


def by_length(rows: list[dict], title: str):
    """One line per mask and backend."""
    lines = sorted({(row["mask"], row["backend"]) for row in rows})
    lengths = {line: {row["kv_len"] for row in rows if (row["mask"], row["backend"]) == line} for line in lines}
    lines = [line for line in lines if len(lengths[line]) > 1] or lines
    figure = new_figure(6.4, 3.4)
    panel = figure.subplots()
    for i, line in enumerate(lines):
        points = sorted((row["kv_len"], row["speedup"]) for row in rows if (row["mask"], row["backend"]) == line)
        style = f"{MARKERS[i // len(COLOURS) % len(MARKERS)]}-"
        panel.plot(*zip(*points, strict=True), style, color=COLOURS[i % len(COLOURS)], lw=1, ms=4, label=" ".join(line))
    panel.axhline(1, color=GREY, lw=0.6)
    panel.set(xscale="log", yscale="log", xlabel="keys", ylabel="speed-up over the fastest dense kernel")
    panel.yaxis.set_major_formatter("{x:g}")
    lengths_on(panel, rows)
    figure.legend(loc="outside right upper", fontsize=6, frameon=False)
    panel.set_title(f"{title}, {rows[0]['shape']}, {rows[0]['device']}", fontsize=10)
    quiet_axes(panel)
    return figure


def first_token(rows: list[dict]):
    """Seconds and peak memory against the length of the prompt."""
    figure = new_figure(8.0, 3.2)
    panels = figure.subplots(1, 2)
    names = sorted({(row["shape"], row["backend"], row["mask"]) for row in rows})
    for i, name in enumerate(names):
        of_name = sorted(
            (row for row in rows if (row["shape"], row["backend"], row["mask"]) == name), key=lambda row: row["kv_len"]
        )
        lengths = [row["kv_len"] for row in of_name]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "lw": 1, "ms": 4}
        panels[0].plot(lengths, [row["ms_p50"] / 1e3 for row in of_name], label=", ".join(name), **style)
        panels[1].plot(lengths, [(row["peak_bytes"] or 0) / 2**30 for row in of_name], **style)
    for panel, label in zip(panels, ("time to first token, s", "peak memory, GiB"), strict=True):
        panel.set(xscale="log", xlabel="tokens of the prompt", ylabel=label)
        lengths_on(panel, rows)
        quiet_axes(panel)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[1].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def lengths_on(panel, rows: list[dict]) -> None:
    """Ticks at the lengths that were measured."""
    lengths = sorted({row["kv_len"] for row in rows})
    panel.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    panel.minorticks_off()


if __name__ == "__main__":
    main()
