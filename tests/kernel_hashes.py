"""Hashes of the instructions of the Triton backend's kernels, compiled for an H100 on any machine.

A change that should leave the kernels as they are leaves the hashes as they are:

    python -m tests.kernel_hashes > before
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace

os.environ.pop("TRITON_INTERPRET", None)

import torch

from attnsieve import Layout, Spans, compile_layout
from attnsieve.backends.call import Call
from attnsieve.backends.triton import gradients, hopper, product_columns
from attnsieve.backends.triton.function import attend
from attnsieve.patterns import columns as columns_at
from attnsieve.patterns import diagonals, random_blocks, sink, window
from tests.gpu_compiler import compile_only
from tests.laws.samples import captured

LENGTH, HEADS, KV_HEADS, WIDTH = 512, 8, 2, 128
PATTERNS = {
    "window": sink(2) | window(9),
    "columns": columns_at(1, 99, 300) | window(20),
    "diagonals": diagonals(0, 7, 90) | window(4),
    "blocks": random_blocks(2, block=64) | window(8),
    "corner": captured(40) | window(8),
}


def calls() -> Iterator[tuple[str, Call]]:
    """Masks of each kind, shared within a KV group and per head; prefill and decode; with and without a bias."""
    for name, pattern in PATTERNS.items():
        for heads in (KV_HEADS, HEADS):
            layout = compile_layout([pattern] * heads, LENGTH)
            # Kernels that do not run leave nothing to read: layouts of one call are not read back.
            yield f"{name}, {heads} masks", call(replace(layout, passing=True, windows=True))
            yield f"{name}, {heads} masks, decode", call(layout, queries=1)
    listed = Layout(LENGTH, torch.full((1, KV_HEADS, LENGTH), LENGTH, dtype=torch.int32), most_keys=LENGTH)
    yield "listed keys", call(listed)
    yield "listed keys, bias", call(listed, torch.zeros(1, KV_HEADS, LENGTH))


def call(layout: Layout, bias: torch.Tensor | None = None, queries: int = LENGTH) -> Call:
    q, k, v = (
        torch.zeros(1, heads, slots, WIDTH, dtype=torch.bfloat16)
        for heads, slots in ((HEADS, queries), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH))
    )
    return Call(q, k, v, layout, Spans.full(1, queries, LENGTH), 0.1, bias)


def instructions(ptx: str) -> str:
    """Without comments, names of labels and what debuggers read."""
    code = ptx[: ptx.find(".section")] if ".section" in ptx else ptx
    lines = (re.sub(r"//.*", "", line).strip() for line in code.splitlines())
    return "\n".join(
        re.sub(r"\$L__\w+", "L", line) for line in lines if line and not line.startswith((".loc", ".file", "$L__tmp"))
    )


def main() -> None:
    compile_only(lambda name, kernel: f"    {name} {hashlib.md5(instructions(kernel.asm['ptx']).encode()).hexdigest()}")
    # As on a GPU: the interpreter cannot multiply bfloat16, and Gluon's kernels are for Hopper alone.
    product_columns.columns_dtype = lambda call: torch.bfloat16
    hopper._capability, hopper.multiprocessors = (lambda device: (9, 0)), (lambda device: 132)
    for name, made in calls():
        print(name, flush=True)
        out, lse = attend(made)
        if made.q.shape[2] == LENGTH:
            gradients.gradients(made, out, lse, out, None)


if __name__ == "__main__":
    main()
