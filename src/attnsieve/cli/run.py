"""attnsieve run: generate text with a model under a plan."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from attnsieve.cli import options, output
from attnsieve.errors import require
from attnsieve.files import read_utf8, utf8


def run(
    model: options.Model,
    plan: Annotated[str | None, typer.Option(help="A saved plan: a directory or a hub id.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="One pattern for every head, such as 'sink(4) | window(256)' or 'dense()'.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A UTF-8 file with the text to continue; - is stdin.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the model's chat template, as a user's turn.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 128,
    backend: options.Backend = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a layer that the plan makes sparse must stay dense.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Generate text with MODEL under a plan, greedily, and report what ran sparse. Without one the model runs as it is.

    Example: attnsieve run smollm2-135m --plan plans/book --prompt-file question.txt --max-new-tokens 64
    """
    from attnsieve.hf import apply, fingerprint

    text = read_prompt(prompt, prompt_file)
    wanted = options.read_plan(plan, pattern) if plan is not None or pattern is not None else None
    require(
        wanted is not None or (backend == "auto" and not strict),
        "--backend and --strict are for attention under a plan: add --plan or --pattern",
    )
    network, tokenizer = options.load(model, device, dtype)
    chosen = None if wanted is None else options.plan_for(wanted, fingerprint(network))
    ids = prompt_ids(tokenizer, text, chat)
    check_room(network, len(ids), max_new_tokens)
    with nullcontext() if chosen is None else apply(network, chosen, backend=backend, strict=strict) as handle:
        start = time.perf_counter()
        new = generate(network, tokenizer, ids, max_new_tokens, stream=not json)
        seconds = time.perf_counter() - start
    report = None if handle is None else handle.report()
    if json:
        written = tokenizer.decode(new, skip_special_tokens=True)
        counts = {"prompt_tokens": len(ids), "new_tokens": len(new), "seconds": seconds}
        output.result_json({"text": written, **counts, "report": report and report.to_json()})
    output.note(
        f"{len(ids)} prompt tokens, {len(new)} new tokens, {seconds:.1f} s\n{report or 'attention as the model has it'}"
    )


def read_prompt(prompt: str | None, path: str | None) -> str:
    """The text to continue. Raises UserError unless it comes from exactly one place and is not empty."""
    require((prompt is None) != (path is None), "say what to continue: --prompt TEXT or --prompt-file FILE (- for stdin)")
    if prompt is None:
        prompt = _read(str(path))
    require(bool(prompt.strip()), "the prompt is empty: give a text to continue")
    # Arguments with bytes of another encoding arrive as lone surrogates, which no tokenizer takes.
    require(
        prompt.isascii() or prompt == prompt.encode(errors="ignore").decode(), "the prompt is not UTF-8 text: convert it first"
    )
    return prompt


def _read(path: str) -> str:
    if path != "-":
        return read_utf8(Path(path))
    with utf8(sys.stdin.buffer, "stdin") as text:
        return text.read()


def prompt_ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of the prompt. Raises UserError where a chat template is asked for and the tokenizer has none."""
    from attnsieve.evaluation.tokens import as_chat, encode

    require(not chat or bool(tokenizer.chat_template), "this model's tokenizer has no chat template: leave --chat out")
    return encode(tokenizer, as_chat(tokenizer, text) if chat else text)


def check_room(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raise UserError where the text would grow beyond the positions that the model was made for."""
    from attnsieve.hf import longest_text

    most = longest_text(model)
    require(
        most is None or prompt_tokens + new_tokens <= most,
        f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the model's {most} positions: shorten the "
        "prompt or lower --max-new-tokens",
    )


def generate(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, *, stream: bool) -> list[int]:
    """Greedy continuation as token ids; with `stream` it is printed while it comes."""
    import torch
    from transformers import TextStreamer

    from attnsieve.evaluation.tokens import stop_options
    from attnsieve.hf.texts import ids_of

    prompt = ids_of(model, [ids])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "max_length": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=pad,
        **stop_options(model.generation_config, tokenizer),
        **settings,
    )
    new: list[int] = out[0, len(ids) :].tolist()
    return new
