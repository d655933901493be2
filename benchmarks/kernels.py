"""The standard measurements, most telling first: `python benchmarks/kernels.py prefill decode backward layout --seconds 150`.

Each line of a suite is what `attnsieve bench` measures with the same words. --warm first runs all of them short, several at a time,
which compiles the kernels into the disk caches (and has them checked). After --seconds no further line is started. Rows are written
as they come; a kernel that fails the oracle ends the script, or with --keep-going its line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from speed_table import KEPT, RULES

from attnsieve.bench.check import WrongResult
from attnsieve.bench.kernels import FLEX
from attnsieve.bench.rows import Row, write
from attnsieve.bench.shapes import shape_of
from attnsieve.bench.suite import Suite

LLAMA = "llama-3.1-8b"
OTHERS = ("llama-3.2-1b", "llama-3.2-3b", "qwen3-32b")
DMA = "dma-1024;dma-2048"
WINDOW = "sink(4) | window(1024)"
# Half of the pairs, where sparse attention has the least to win.
HALF = "blocks-50;blocks-25;columns-50"
CHOSEN = ";".join(KEPT + rule for rule in RULES)
STEPS = "columns-10;columns-5;columns-10+;columns-5+;dense()"
# Long enough for every kernel to be compiled.
SHORT = "2048"
# op, masks, shape, lengths, backends, baselines.
STANDARD = {
    "prefill": [
        ("prefill", f"C;B;blocks-10;A;C+;{DMA}", LLAMA, "32768", "triton", "cudnn,flash,fa4"),
        ("prefill", f"C;B;blocks-10;C+;{DMA}", LLAMA, "131072", "triton", "cudnn,fa4"),
        ("prefill", "blocks-50;blocks-25;blocks-5;columns-5;columns-50;dense()", LLAMA, "32768", "triton", "cudnn,fa4"),
        ("prefill", "blocks-25;blocks-10;C;B;dense()", LLAMA, "8192", "triton", "cudnn,flash,fa4"),
        ("prefill", "blocks-50;blocks-25;C", LLAMA, "4096", "triton", "cudnn,flash,fa4"),
    ],
    "auto": [
        ("prefill", f"{HALF};blocks-10;C;B;A;{WINDOW}", LLAMA, "8192,32768", "auto", "cudnn,flash,fa4"),
        ("prefill", f"{HALF};columns-10;columns-5;C;B;{WINDOW}", LLAMA, "131072", "auto", "cudnn,fa4"),
    ],
    "decode": [
        ("decode", STEPS, LLAMA, "131072", "triton", "cudnn,flash"),
        ("decode", STEPS, LLAMA, "32768,16384,8192,4096", "triton", "cudnn,flash"),
    ],
    "backward": [
        ("forward_backward", DMA, LLAMA, "32768", "triton", "cudnn,fa4"),
        ("forward_backward", "dma-2048", LLAMA, "131072", "triton", "cudnn,fa4"),
        ("forward_backward", "C;blocks-10", LLAMA, "32768", "triton", "cudnn,fa4"),
    ],
    "layout": [
        ("layout", f"blocks-10;B;C;{DMA}", LLAMA, "32768,131072", "triton", ""),
        ("select", f"{CHOSEN};{DMA}", LLAMA, "32768,131072", "auto", ""),
    ],
    "fa4": [
        ("prefill", f"C;columns-50;blocks-10;C+;{WINDOW}", LLAMA, "32768", "fa4", "fa4"),
        ("prefill", "blocks-25;blocks-10;C;columns-50;columns-10;window(1024);dense()", LLAMA, "8192", "fa4", "fa4"),
        ("prefill", "blocks-50;blocks-25;blocks-5;B;columns-5;window(4096);dense()", LLAMA, "32768", "fa4", "fa4"),
        ("prefill", f"C;blocks-10;C+;columns-5;{WINDOW}", LLAMA, "131072", "fa4", "fa4"),
    ],
    # A line for each kind of mask: what torch compiles for one serves all masks of its kind.
    "flex": [
        ("prefill", "A;B", LLAMA, "32768", "flex-triton,flex-flash", "cudnn,fa4"),
        ("prefill", "blocks-25;blocks-50;blocks-5;blocks-10", LLAMA, "32768", "flex-triton,flex-flash", "cudnn,fa4"),
        ("prefill", "C", LLAMA, "131072", "flex-triton,flex-flash", "fa4"),
        ("prefill", "blocks-10", LLAMA, "131072", "flex-triton,flex-flash", "fa4"),
        ("prefill", "C", LLAMA, "8192", "flex-triton,flex-flash", "cudnn,fa4"),
        ("prefill", "blocks-10", LLAMA, "8192", "flex-triton,flex-flash", "cudnn,fa4"),
        ("prefill", "C", LLAMA, "32768", "flex-triton,flex-flash", "cudnn,fa4"),
    ],
    "scattered": [
        ("prefill", "A;A+", LLAMA, "32768", "triton", "fa4"),
        ("prefill", "A;A+", LLAMA, "8192", "triton", "fa4"),
        ("prefill", "A;A+", OTHERS[0], "8192", "triton", "cudnn,fa4"),
        ("prefill", "A", LLAMA, "131072", "triton", "fa4"),
        ("prefill", "A;A+", OTHERS[0], "32768,131072", "triton", "fa4"),
    ],
    # Bands of diagonals as many as columns.
    "bands": [("prefill", "B-10;B-5", LLAMA, "131072", "auto", "fa4")],
    # Keys chosen from q and k whose neighbours are alike: with choosing, and without.
    "chosen": [("prefill", CHOSEN, LLAMA, lengths, "auto", "fa4") for lengths in ("8192,32768", "131072")],
    # Who is fastest, measured and not chosen: what costs of other shapes are fitted to.
    "choices": [
        *(("prefill", "blocks-10;C;columns-50", shape, "32768", "triton,fa4", "fa4") for shape in OTHERS),
        *(("prefill", "blocks-10;C;columns-50;window(1024)", shape, "8192", "triton,fa4", "cudnn,fa4") for shape in OTHERS),
        *(("prefill", "blocks-10;blocks-50;window(1024)", shape, "4096", "triton,fa4", "cudnn,fa4") for shape in OTHERS),
    ],
    "shapes": [
        *(("prefill", "blocks-10;C;columns-50", shape, "32768", "auto", "cudnn,fa4") for shape in OTHERS),
        *(("prefill", "blocks-10;C;columns-50", shape, "8192", "auto", "cudnn,fa4") for shape in OTHERS),
        *(("decode", "columns-10;columns-10+", shape, "131072", "triton", "cudnn") for shape in OTHERS),
        *(("prefill", "blocks-10;C", shape, "131072", "auto", "cudnn,fa4") for shape in OTHERS),
        *(("prefill", "blocks-10;blocks-50", shape, "4096", "auto", "cudnn,fa4") for shape in OTHERS),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=STANDARD)
    parser.add_argument("--plan", metavar="DIRECTORY:LAYER;...", help="layers of a saved plan of SmolLM2-135M, measured last")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--budget-ms", type=float, default=100.0)
    parser.add_argument("--warm", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    arguments = parser.parse_args()
    start = time.monotonic()
    # The first line of every suite comes before the second line of any.
    longest = max(len(STANDARD[name]) for name in arguments.suites)
    lines = [STANDARD[name][i] for i in range(longest) for name in arguments.suites if i < len(STANDARD[name])]
    if arguments.plan:
        lines.append(("prefill", arguments.plan, "smollm2-135m", "4096,8192", "auto", "cudnn,flash,fa4"))
    if arguments.warm:
        warm(lines, arguments.warm)
        print(f"[{time.monotonic() - start:5.1f} s] warm", flush=True)
    failed = False
    for line in lines:
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time, not measured: {line}")
            continue
        try:
            for row in suite(line, arguments.budget_ms).rows():
                print(f"[{time.monotonic() - start:5.1f} s] {row}", flush=True)
                if isinstance(row, Row):
                    write([row], arguments.out)
        except WrongResult as error:
            failed = True
            print(f"wrong result, no row: {line}: {error}", flush=True)
            if not arguments.keep_going:
                break
    sys.exit(1 if failed else 0)


def warm(lines: list[tuple[str, ...]], processes: int) -> None:
    """Compile what the lines will run, each mask and shape once, what takes longest first."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    jobs = sorted({job for line in lines for job in short_lines(line)}, key=lambda job: (job[3] == SHORT, job))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for job, problem in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if problem:
                print(f"warming {job}: {problem}", flush=True)


def short_lines(line: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """One line for each kernel of a line. What torch compiles is for one length, the line's, and for all masks of one kind. What
    auto takes depends on the length."""
    op, masks, shape, lengths, backends, baselines = line
    compared = op in ("prefill", "decode")
    for baseline in baselines.split(","):
        yield op, "dense()", shape, SHORT, "", baseline
    for backend in backends.replace("auto", "triton,fa4" if compared else "auto").split(","):
        if backend in FLEX:
            yield op, masks.split(";")[0], shape, lengths.split(",")[0], backend, ""
        else:
            yield from ((op, mask, shape, SHORT, backend, "") for mask in masks.split(";"))


def compile_one(line: tuple[str, ...]) -> str | None:
    """Run a line short; what went wrong, or None. The measurement itself will say it again."""
    try:
        list(suite(line, 0.0).rows())
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-200:]}"
    return None


def suite(line: tuple[str, ...], budget_ms: float) -> Suite:
    op, masks, shape, lengths, backends, baselines = line
    split = lambda text, by: [part for part in text.split(by) if part]  # noqa: E731
    return Suite(
        op,
        split(masks, ";"),
        [shape_of(shape)],
        [int(n) for n in lengths.split(",")],
        split(backends, ","),
        split(baselines, ","),
        torch.bfloat16,
        "cuda",
        budget_ms=budget_ms,
    )


if __name__ == "__main__":
    main()
