"""attnsieve train: a small decoder from nothing, or a dense model converted to DMA, on text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnsieve.cli import options, output
from attnsieve.cli.fit import named_values
from attnsieve.errors import UserError, require
from attnsieve.files import read_utf8
from attnsieve.show import markdown
from attnsieve.show.results import with_error

if TYPE_CHECKING:
    from attnsieve.nn import DmaForCausalLM

# Rows of `nn.training.train`.
Log = list[dict[str, Any]]
# A model that trains on a laptop; a configuration file replaces all of it.
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "initial_A": 0.02}
# Pieces of text (64K characters at most) that a tokenizer is learned from.
TOKENIZER_PIECES = 1000
# What is measured of a converted model: metric -> what it is called.
MEASURES = {"nll": "text, nats per token", "exact_match": "kv exact match", "answer_nll": "kv answer, nats per token"}


def train(
    text: Annotated[
        str,
        typer.Option(help="A .txt, .md or .jsonl file, a folder of them, hub:NAME[:CONFIG], or python-docs, bible, essays."),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the model, its tokenizer, the log and the checkpoints.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 1000,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=2)] = 512,
    layer: Annotated[str, typer.Option(help="Attention of all layers: dma, mha, mqa, gqa, swa, mla or nsa.")] = "dma",
    keep: Annotated[
        int | None,
        typer.Option(
            help="Keys that a row keeps: swa's window, or DMA's budget, to which a window of a quarter of it is added "
            "(--set window=N). A quarter of --length if not given.",
            min=1,
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or YAML with fields of DmaConfig, such as hidden_size.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of DmaConfig as NAME=VALUE; repeat for several.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A hub id, a directory, smollm2-135m, bytes, or bpe:SIZE to learn one from the text; default bpe:4096."
        ),
    ] = None,
    convert: Annotated[
        str | None, typer.Option(help="Start from this dense model, converted to DMA; measure it before and after.")
    ] = None,
    eval_text: Annotated[str, typer.Option(help="Text that a converted model is measured on.")] = "python-docs",
    eval_items: Annotated[
        int, typer.Option(help="Texts and key-value lists that a converted model is measured on.", min=2)
    ] = 4,
    batch_size: Annotated[int, typer.Option(help="Sequences per step and process.", min=1)] = 8,
    accumulation: Annotated[int, typer.Option(help="Batches added up in a step.", min=1)] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate; rises over --warmup steps, falls as a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps until the peak learning rate.", min=0)] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast); weights stay float32.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass, for less memory.")
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps between rows of the log.", min=1)] = 10,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the newest checkpoint in --out, all else as before.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Train a decoder on text: with DMA, or with an attention it is compared with. Runs on a CPU, a GPU, or under torchrun.

    Example: attnsieve train --text book.txt --length 1024 --keep 128 --steps 2000 --out runs/book

    Example: attnsieve train --convert smollm2-135m --text book.txt --length 2048 --keep 512 --steps 200 --lr 1e-4 --out runs/dma
    """
    require(find_spec("accelerate") is not None, "training needs accelerate; run: pip install 'attnsieve[train]'")
    from attnsieve.nn.training import TrainingSettings
    from attnsieve.nn.training import train as run

    options.new_folder(out)
    chosen = TrainingSettings(
        steps=steps,
        length=length,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=lr,
        warmup=warmup,
        precision="bfloat16" if bf16 else "float32",
        checkpointing=checkpointing,
        log_every=log_every,
        save_every=save_every,
        seed=seed,
    )
    fields = read_config(config) | named_values(settings or [])
    source, keep = read_text(text), keep or max(1, length // 4)
    learn = partial(run, text=source, out=out, settings=chosen, resume=resume)
    measures: dict[str, dict[str, str]] = {}
    if convert is None:
        words = read_tokenizer(tokenizer or "bpe:4096", source)
        sizes = {} if config else SMALL | {"max_position_embeddings": length}
        log = learn(new_model(layer, keep, words, sizes | fields, seed), words)
    else:
        require(
            (layer, tokenizer, config) == ("dma", None, None),
            "--convert gives a model DMA layers and keeps its sizes and tokenizer: leave out --layer, --tokenizer and --config",
        )
        measure = partial(Measure, text=eval_text, length=length, items=eval_items)
        log, measures = convert_and_train(convert, keep, fields, seed, measure, learn)
    if first_process():
        report(out, log, measures, json)


def read_config(path: Path | None) -> dict[str, Any]:
    """Fields of DmaConfig from a JSON or YAML file; none without a path."""
    import yaml

    if path is None:
        return {}
    try:
        fields = yaml.safe_load(read_utf8(path))  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"{path} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    require(isinstance(fields, dict), f"{path} must hold names and values, such as hidden_size: 256")
    return dict(fields)


def read_text(name: str) -> str | list[str]:
    """What `nn.train` reads: the text inside an installed package, or the name of files or of a data set."""
    from attnsieve.evaluation.text import PACKAGED

    return [PACKAGED[name]()] if name in PACKAGED else name


def read_tokenizer(name: str, source: str | list[str]) -> Any:
    """The tokenizer of that name, or one learned from the text."""
    from transformers import AutoTokenizer

    from attnsieve.hf.loading import SMOLLM2, load_model
    from attnsieve.nn.corpus import open_text
    from attnsieve.nn.tokenizer import LEAST, byte_level_tokenizer

    kind, _, size = name.partition(":")
    if name == "bytes" or (kind == "bpe" and size.isdecimal()):
        pieces = (piece for piece, _ in islice(open_text(source)(), TOKENIZER_PIECES))
        return byte_level_tokenizer(pieces, int(size or LEAST))
    if name == SMOLLM2:
        return load_model(name)[1]
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer {name!r}: {str(error).splitlines()[0]}; give a hub id, a directory, {SMOLLM2}, bytes or bpe:SIZE"
        ) from None


def new_model(layer: str, keep: int, words: Any, fields: dict[str, Any], seed: int) -> DmaForCausalLM:
    """A model with random weights, for the tokenizer `words`."""
    import torch

    from attnsieve.nn import DmaForCausalLM

    budget = {"dma": dma_rule(keep), "swa": {"sliding_window": keep}}.get(layer, {})
    ends = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    chosen = configuration({"attention": layer, **budget, **ends, **fields})
    require(
        chosen.vocab_size >= len(words),
        f"the tokenizer has {len(words)} tokens, the model is to have {chosen.vocab_size}: leave vocab_size out",
    )
    torch.manual_seed(seed)
    return DmaForCausalLM(chosen)


def dma_rule(keep: int) -> dict[str, int]:
    """Without a local window language models learn little of what stands next to a token (docs/LOG.md)."""
    return {"keep_window_size": keep, "window": keep // 4}


def configuration(fields: dict[str, Any]) -> Any:
    """A DmaConfig. Raises UserError for names that it does not have and values that it cannot take."""
    from dataclasses import fields as fields_of

    from huggingface_hub.errors import StrictDataclassError

    from attnsieve.nn import DmaConfig

    defaults = {field.name: field.default for field in fields_of(DmaConfig)}
    for name, value in fields.items():
        require(name in defaults, f"DmaConfig has no field {name!r}: see the help of attnsieve.nn.DmaConfig")
        usual = defaults[name]
        good = usual is None or isinstance(value, (int, float) if isinstance(usual, float) else type(usual))
        require(good, f"{name} must be of the kind of {usual!r}, got {value!r}")
    try:
        return DmaConfig(**fields)
    except (StrictDataclassError, TypeError) as error:
        raise UserError(f"the model cannot be configured so: {' '.join(str(error).split())}") from None


def converted(dense: Any, keep: int, fields: dict[str, Any], seed: int) -> DmaForCausalLM:
    """`dense` with DMA layers. A starts a little above 0, so that the scores learn from the first step."""
    from attnsieve.nn import convert

    return convert(dense, seed=seed, **(dma_rule(keep) | {"initial_A": SMALL["initial_A"]} | fields))


def convert_and_train(
    name: str, keep: int, fields: dict[str, Any], seed: int, of_tokenizer: Callable[[Any], Measure], learn: Callable[..., Log]
) -> tuple[Log, dict[str, dict[str, str]]]:
    """The log of `learn`, and what is measured of the dense model of that name, of the converted one and of the trained one."""
    dense, words = options.load(name, "auto", "float32")
    measure = of_tokenizer(words)
    measures = {"dense": measure(dense)}
    model = converted(dense, keep, fields, seed)
    measures["converted"] = measure(model)
    del dense
    log = learn(model, words)
    measures["trained"] = measure(model.eval())
    return log, measures


@dataclass(frozen=True)
class Measure:
    """Perplexity and key-value retrieval of a model at the training length, as text; nothing but in the first process."""

    tokenizer: Any
    text: str
    length: int
    items: int

    def __call__(self, model: Any) -> dict[str, str]:
        from attnsieve.evaluation import evaluate, make_task

        if not first_process():
            return {}
        tasks = [make_task("perplexity", text=self.text), make_task("kv")]
        rows = evaluate(model, self.tokenizer, {}, tasks, [self.length], self.items)
        return {row.metric: with_error(row.value, row.stderr) for row in rows if row.metric in MEASURES}


def first_process() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def report(out: Path, log: Log, measures: dict[str, dict[str, str]], json: bool) -> None:
    """The last logged row, what a conversion changed, and what could be done next."""
    last: dict[str, Any] = next((row for row in reversed(log) if "loss" in row), {})
    output.note(f"saved in {out}; next: attnsieve run {output.quoted(out)} --prompt TEXT")
    if json:
        output.result_json({"out": str(out), "log": log, "measures": measures})
        return
    output.result("  ".join(f"{name} {value:.4g}" for name, value in last.items()))
    if measures:
        cells = [[name, *(found[metric] for metric in MEASURES)] for name, found in measures.items()]
        output.result(markdown(["model", *MEASURES.values()], cells, left=[0]))
