"""attnsieve profile: observe what a model attends to, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnsieve.cli import options, output
from attnsieve.errors import require

if TYPE_CHECKING:
    from attnsieve.evaluation.text import TextSource


def profile(
    model: options.Model,
    data: Annotated[
        list[str],
        typer.Option(
            help="Text to observe: a file, synthetic, python-docs, bible, essays. Repeat for several; each gives its share."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the profile.")],
    pcl: Annotated[int, typer.Option(help="Capture length: mean attention maps are kept for this many tokens.", min=1)] = 512,
    lengths: Annotated[str, typer.Option(help="Lengths to take statistics at beyond pcl, such as 2048,8192.")] = "2048",
    documents: Annotated[
        int, typer.Option(help="How many stretches of text to observe, each of the longest length.", min=1)
    ] = 64,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Observe what MODEL attends to on text, and save a profile.

    Example: attnsieve profile smollm2-135m --data book.txt --documents 32 --out profiles/book
    """
    from attnsieve.evaluation.text import text_source
    from attnsieve.hf import check_positions
    from attnsieve.hf import profile as observe
    from attnsieve.profiling import Profile

    probed = options.lengths_of(lengths)
    require(
        min(probed) > pcl, f"--lengths must exceed the capture length --pcl {pcl}, got {lengths}: raise them, or lower --pcl"
    )
    options.new_folder(out, Profile)
    require(len(data) <= documents, f"{len(data)} texts for {documents} documents: raise --documents")
    sources = [text_source(name) for name in data]
    network, tokenizer = options.load(model, device, dtype)
    check_positions(network, max(pcl, *probed))
    texts = text_windows(sources, tokenizer, max(pcl, *probed), documents, seed)
    observed = observe(network, texts, pcl=pcl, lengths=probed, provenance={"model": model, "data": data, "seed": seed})
    observed.save_pretrained(out)
    at = output.quoted(out)
    output.note(f"saved in {out}; next: attnsieve fit {at} --out PLAN, or attnsieve show {at}")
    if json:
        output.result_json({"out": str(out), "pcl": pcl, "lengths": probed, "provenance": observed.provenance})
    else:
        output.result(str(observed))


def text_windows(sources: list[TextSource], tokenizer: Any, length: int, documents: int, seed: int) -> list[list[int]]:
    """`documents` stretches of `length` token ids, shared evenly among the texts."""
    from attnsieve.evaluation.text import token_windows

    shares = [documents // len(sources) + (number < documents % len(sources)) for number in range(len(sources))]
    windows: list[list[int]] = []
    for source, share in zip(sources, shares, strict=True):
        windows += token_windows(source, tokenizer, length, share, seed)
    return windows
