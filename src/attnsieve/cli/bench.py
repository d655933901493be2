"""attnsieve bench: kernels and whole models, measured beside dense attention; wrong results are never reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnsieve.cli import options, output
from attnsieve.errors import require

if TYPE_CHECKING:
    import torch

    from attnsieve.bench.rows import Row
    from attnsieve.bench.suite import Skipped

WRONG_RESULT = 1
Masks = Annotated[
    str,
    typer.Option(
        help="Names such as blocks-10, C, dma-1024, patterns, or PLAN:LAYER, separated by semicolons; "
        "for ttft patterns, or folders of plans."
    ),
]


def bench(
    op: Annotated[str, typer.Argument(help="prefill, decode, forward_backward, layout, select or ttft.")],
    masks: Masks = "blocks-10",
    shapes: Annotated[
        str,
        typer.Option(
            help="llama-3.1-8b, llama-3.2-1b, llama-3.2-3b; except for ttft also qwen3-32b, 70b-layer, smollm2-135m; "
            "for ttft also real models by name, folder or .gguf file."
        ),
    ] = "llama-3.1-8b",
    lengths: Annotated[str, typer.Option(help="Keys, such as 8K,32K.")] = "8K",
    backends: Annotated[str, typer.Option(help="auto, triton, fa4, portable, flex-triton and others.")] = "auto",
    baselines: Annotated[
        str,
        typer.Option(help="Dense kernels: cudnn, flash, fa4, sdpa, flex-triton, flex-flash; auto takes what is always there."),
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Batch rows.", min=1)] = 1,
    budget_ms: Annotated[float, typer.Option(help="How long one measurement is repeated.", min=0)] = 200.0,
    out: Annotated[Path | None, typer.Option(help="Add rows to this .jsonl file as they are measured.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Measure attention. Every kernel is compared with a float64 oracle first; one that fails stops with exit code 1, no row.

    ttft is the time to first token of a whole model, with random weights or a real one with prompts of text; its baselines are
    sdpa and eager, its backends those of apply, "fastest" included.

    Example: attnsieve bench prefill --masks "blocks-10;C;sink(4) | window(1024)" --lengths 8K,32K --backends triton,fa4
    """
    from attnsieve.bench.check import WrongResult
    from attnsieve.bench.rows import check_target, write
    from attnsieve.bench.suite import Skipped

    options.rows_file(out)
    if out is not None:
        check_target(out)
    where = options.device_of(device)
    number = options.dtype_of(dtype, where)
    wanted = _Wanted(
        op,
        options.parts_of(masks, ";"),
        options.parts_of(shapes),
        options.lengths_of(lengths),
        options.parts_of(backends),
        options.parts_of(baselines),
    )
    measured = (_whole_models if op == "ttft" else _kernels)(wanted, str(where), number, batch, budget_ms)
    rows: list[Row] = []
    try:
        for row in measured:
            if isinstance(row, Skipped):
                output.note(str(row))
                continue
            rows.append(row)
            if out is not None:
                write([row], out)
            if not json:
                output.result(str(row))
    except WrongResult as error:
        output.note(f"attnsieve: wrong result, no row: {error}")
        raise typer.Exit(WRONG_RESULT) from None
    require(bool(rows), "nothing could be measured: see the reasons above")
    if json:
        output.result_json({"rows": [row.to_json() for row in rows]})


@dataclass(frozen=True)
class _Wanted:
    op: str
    masks: list[str]
    shapes: list[str]
    lengths: list[int]
    backends: list[str]
    baselines: list[str]


def _kernels(wanted: _Wanted, device: str, dtype: torch.dtype, batch: int, budget_ms: float) -> Iterator[Row | Skipped]:
    from attnsieve.bench.dense import default_baselines
    from attnsieve.bench.shapes import shape_of
    from attnsieve.bench.suite import Suite

    shapes = [shape_of(name) for name in wanted.shapes]
    baselines = default_baselines(device) if wanted.baselines == ["auto"] else wanted.baselines
    return Suite(
        wanted.op, wanted.masks, shapes, wanted.lengths, wanted.backends, baselines, dtype, device, batch, budget_ms
    ).rows()


def _whole_models(wanted: _Wanted, device: str, dtype: torch.dtype, batch: int, _: float) -> Iterator[Row | Skipped]:
    from attnsieve.bench.ttft import Setting, rows

    dense = ["sdpa"] if wanted.baselines == ["auto"] else wanted.baselines
    for model in wanted.shapes:
        yield from rows(Setting(model, wanted.lengths, wanted.masks, wanted.backends, dense, batch, dtype, device))
