"""Measure the kernels on a GPU and append rows to benchmarks/results: python benchmarks/kernels.py prefill decode backward

Bfloat16, 32 query and 8 KV heads of width 128. A mask named with a + is shared by the heads of a KV group.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from attnsieve.bench import kernels
from attnsieve.bench.kernels import Case
from attnsieve.bench.rows import Row, write


def prefill_rows(lengths: list[int]) -> Iterator[Row]:
    """Masks by block and by token."""
    for n in lengths:
        for name in ("blocks-50", "blocks-25", "blocks-10", "blocks-5", "A", "B", "C", "columns-5"):
            if n <= 32768 or name not in ("A", "blocks-50", "blocks-25"):
                yield kernels.prefill(Case(name, n), "triton")
        yield kernels.prefill(Case("C", n, shared=True), "triton")
        for name in ("dma-1024", "dma-2048"):
            yield kernels.prefill(Case(name, n, shared=True, bias=True), "triton")


def decode_rows(lengths: list[int]) -> Iterator[Row]:
    """Kept columns and a window."""
    for n in lengths:
        for name in ("columns-10", "columns-5", "columns-2"):
            for shared in (True, False):
                yield kernels.decode(Case(name, n, shared=shared), "triton")


def backward_rows(lengths: list[int]) -> Iterator[Row]:
    """Forward and backward."""
    for n in lengths:
        for name in ("dma-1024", "dma-2048"):
            yield kernels.forward_backward(Case(name, n, shared=True, bias=True), "triton")
        yield kernels.forward_backward(Case("C", n), "triton")
        yield kernels.forward_backward(Case("blocks-10", n), "triton")


def layout_rows(lengths: list[int]) -> Iterator[Row]:
    """Schedules of the prefill kernel."""
    from attnsieve.backends.triton.schedule import schedule

    for n in lengths:
        for name in ("blocks-10", "B", "C"):
            yield kernels.schedule(Case(name, n), "triton", lambda layout: schedule(layout, 128, 64))
        for name in ("dma-1024", "dma-2048"):
            yield kernels.schedule(Case(name, n, shared=True), "triton", lambda layout: schedule(layout, 32, 64))


SUITES = {"prefill": prefill_rows, "decode": decode_rows, "backward": backward_rows, "layout": layout_rows}


def main() -> None:
    """Run suites; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    args = parser.parse_args()
    for suite in args.suites:
        for row in SUITES[suite]([int(n) for n in args.lengths.split(",")]):
            print(row, flush=True)
            write([row], args.out)


if __name__ == "__main__":
    main()
