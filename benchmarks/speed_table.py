"""The tables of speed in docs/RESULTS.md: one attention layer of 32/8 heads of width 128, FlexAttention, keys chosen from the input,
and time to first token.

python benchmarks/speed_table.py benchmarks/results/kernels.jsonl benchmarks/results/dma.jsonl
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnsieve.bench.rows import read
from attnsieve.show import markdown, percent

Rows = dict[tuple[Any, ...], dict[str, Any]]
LAYER = {"batch": 1, "q_heads": 32, "kv_heads": 8, "head_dim": 128}
K = 1024
FLEX, OURS = ("flex-triton", "flex-flash"), ("triton", "fa4")
# DMA's own call, which selects keys each time.
DMA = "dynamic_mask_attention"
# What a line is called; operation, mask and backend of its rows, and their numbers of keys.
LINES = (
    ("prefill, 10 % of 128 x 128 blocks (`fa4`)", "prefill", "blocks-10", "fa4", (32, 128)),
    ("prefill, `sink(4) | window(1024)` (`fa4`)", "prefill", "sink(4) | window(1024)", "fa4", (128,)),
    ("prefill, 1000 columns per head, a window of 1024 (`fa4`)", "prefill", "C", "fa4", (32, 128)),
    ("the same by `triton`", "prefill", "C", "triton", (128,)),
    ("prefill, half of all columns, random per head (`fa4`)", "prefill", "columns-50", "fa4", (8,)),
    ("prefill, clusters and bands of diagonals (`triton`)", "prefill", "B", "triton", (128,)),
    ("prefill, scattered diagonals and columns (`triton`)", "prefill", "A", "triton", (8, 32, 128)),
    ("prefill, DMA with 1024 keys a row", "prefill", "dma-1024", DMA, (32, 128)),
    ("forward and backward, DMA with 2048 keys", "forward_backward", "dma-2048", DMA, (32, 128)),
    ("decode, 10 % of the keys, one mask per KV group", "decode", "columns-10+", "triton", (128,)),
    ("decode, 10 % of the keys, a mask per query head", "decode", "columns-10", "triton", (128,)),
)
LAYER_HEADER = ("what", "tokens", "density", "dense", "ours", "with building", "speed-up", "of the ideal")
# Masks that FlexAttention was timed on, and their numbers of keys.
FLEX_LINES = (
    ("10 % of 128 x 128 blocks", "blocks-10", (8, 32, 128)),
    ("25 %", "blocks-25", (32,)),
    ("50 %", "blocks-50", (32,)),
    ("1000 columns per head, a window of 1024", "C", (8, 32, 128)),
    ("clusters and bands of diagonals", "B", (32,)),
    ("scattered diagonals and columns", "A", (32,)),
)
FLEX_HEADER = ("prefill", "tokens", "Flex, Triton", "Flex, FLASH", "ours", "dense")
# Rules that choose keys from the input, beside which every head keeps these.
KEPT = "sink(4) | window(64) | "
RULES = (
    "vertical_slash(mass=0.9)",
    "probed_blocks(mass=0.9)",
    "probed_keys(mass=0.9)",
    "probed_keys(mass=0.9, block=256, rows=4)",
)
CHOSEN_LENGTHS = (8, 32, 128)
CHOSEN_HEADER = ("chosen by", "tokens", "density", "dense", "attention", "with choosing", "speed-up, with choosing")
PATTERN = "sink(4) | window(1024)"
MODEL_HEADER = ("model", "prompts", "density", "SDPA", "ours", "ours, first of their length", "peak, SDPA", "peak, ours")
MODEL_CELLS = (("sdpa", False), ("auto", False), ("auto", True))


def newest(rows: Iterable[dict[str, Any]]) -> Rows:
    """The last row of each measurement of the layer; what `auto` took is a measurement of that backend, but for building, which
    takes longer where several are looked at."""
    ours = [row for row in rows if all(row[name] == size for name, size in LAYER.items())]
    return {
        (row["op"], row["mask"], _backend(row), row["kv_len"], row["includes_mask_building"]): row
        for row in sorted(ours, key=lambda row: row["date"])
    }


def _backend(row: dict[str, Any]) -> str:
    name: str = row["backend"]
    return name if row["includes_mask_building"] else name.removeprefix("auto: ")


def layer_lines(rows: Rows) -> list[list[str]]:
    """One line for each number of keys; a name stands once. Speed-ups are of attention alone where that is a call of its own."""
    lines = []
    for name, *what, lengths in LINES:
        for place, length in enumerate(lengths):
            alone, built = (rows.get((*what, length * K, building)) for building in (False, True))
            row = alone or built
            if row is None:
                raise SystemExit(f"no row of {what} at {length}K keys")
            speedup = row["baseline_ms_p50"] / row["ms_p50"]
            times = ["" if one is None else written(one["ms_p50"], "ms") for one in (alone, built)]
            numbers = [f"{percent(row['density'])} %", written(row["baseline_ms_p50"], "ms"), *times]
            ideal = short(f"{speedup * row['density']:.2f}")
            lines.append(["" if place else name, f"{length}K", *numbers, short(f"{speedup:.2g}"), ideal])
    return lines


def flex_lines(rows: Rows) -> list[list[str]]:
    """Attention alone; ours by the faster of its backends."""
    lines = []
    for name, mask, lengths in FLEX_LINES:
        for place, length in enumerate(lengths):
            timed = {backend: rows.get(("prefill", mask, backend, length * K, False)) for backend in FLEX + OURS}
            flex = [row and row["ms_p50"] for row in (timed[backend] for backend in FLEX)]
            fastest = min((row for row in (timed[backend] for backend in OURS) if row), key=lambda row: row["ms_p50"])
            times = [*flex, fastest["ms_p50"], fastest["baseline_ms_p50"]]
            shown = ["not served" if ms is None else written(ms, "ms") for ms in times]
            lines.append(["" if place else name, f"{length}K", *shown])
    return lines


def chosen_lines(rows: Rows) -> list[list[str]]:
    """Attention by keys that are chosen from the input, and with choosing them and all that is derived."""
    lines = []
    for rule in RULES:
        for place, length in enumerate(CHOSEN_LENGTHS):
            alone = rows["prefill", KEPT + rule, "triton", length * K, False]
            whole = rows["prefill", KEPT + rule, "auto: triton", length * K, True]
            times = [written(ms, "ms") for ms in (whole["baseline_ms_p50"], alone["ms_p50"], whole["ms_p50"])]
            speedup = short(f"{whole['baseline_ms_p50'] / whole['ms_p50']:.2g}")
            lines.append(["" if place else f"`{rule}`", f"{length}K", f"{percent(whole['density'])} %", *times, speedup])
    return lines


def model_lines(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Seconds to the first token and peak memory, by model, number of prompts and their length."""
    found: Rows = {
        (row["shape"], row["batch"], row["kv_len"], row["backend"], row["includes_mask_building"]): row
        for row in rows
        if row["op"] == "ttft" and row["backend"] in ("sdpa", "auto")
    }
    lines = []
    for model, batch, length in sorted({key[:3] for key in found if key[3] == "auto"}):
        dense, ours, first = (found[model, batch, length, *cell] for cell in MODEL_CELLS)
        seconds = [written(row["ms_p50"] / 1000, "s") for row in (dense, ours, first)]
        memory = [written(row["peak_bytes"] / 2**30, "GiB") for row in (dense, ours)]
        lines.append([model, f"{batch} x {length // K}K", f"{percent(ours['density'])} %", *seconds, *memory])
    return lines


def written(number: float, unit: str) -> str:
    """Three digits: 204 ms, 23.7 ms, .043 ms."""
    return f"{short(f'{number:.3g}')} {unit}"


def short(number: str) -> str:
    return number.removeprefix("0") if number.startswith("0.") else number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of rows, of which the newest count")
    files = parser.parse_args().rows
    rows = read(files)
    print(markdown(LAYER_HEADER, layer_lines(newest(rows))))
    print()
    print(markdown(FLEX_HEADER, flex_lines(newest(rows))))
    print("\nKeys chosen from the input:\n")
    print(markdown(CHOSEN_HEADER, chosen_lines(newest(rows))))
    print(f"\nRandom weights, {PATTERN} in all layers:\n")
    print(markdown(MODEL_HEADER, model_lines([row for row in rows if row["mask"] in ("dense()", PATTERN)])))


if __name__ == "__main__":
    main()
