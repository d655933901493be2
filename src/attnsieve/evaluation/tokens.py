"""Prompts as token ids: one encoding rule, the split between prompt and answer, and filling a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attnsieve.errors import UserError, require


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, with the special tokens first that the tokenizer puts there by itself (most often BOS), unless the text
    begins with them. What it puts behind a text is left out: after an EOS nothing would be left to say."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    start = _start(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


# The same prompts are scored under every plan: some cells' questions, half a gigabyte where they have 8K tokens each.
@lru_cache(maxsize=2048)
def split_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer as the tokenizer would cut the text of both.

    A tokenizer may join the end of the prompt with the answer (a space with a word); what it joins belongs to the answer.
    Raises UserError where either is empty.
    """
    whole = encode(tokenizer, prompt + answer)
    shared = shared_length([encode(tokenizer, prompt), whole])
    require(0 < shared < len(whole), f"the answer {answer!r:.40} is empty, or its prompt is")
    return whole[:shared], whole[shared:]


def shared_length(sequences: Sequence[Any]) -> int:
    """How many leading elements all sequences (texts, or lists of ids) have in common."""
    # What the first and the last of them in order share, all of them do.
    pairs = zip(min(sequences), max(sequences), strict=False)
    shortest = min(map(len, sequences))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), shortest)


def as_chat(tokenizer: Any, prompt: str) -> str:
    """`prompt` as a user's turn in the tokenizer's chat template; unchanged where it has none. Raises UserError where it fails."""
    if not tokenizer.chat_template:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of others
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the tokenizer's chat template does not take a single turn of a user ({said:.200}): mend tokenizer.chat_template, or do "
            "without it"
        ) from error
    return text


def stop_options(settings: Any, tokenizer: Any) -> dict[str, Any]:
    """Options of transformers' `generate` for checkpoints that end at strings; others, and their models, want no tokenizer.
    settings: a generation configuration."""
    return {"tokenizer": tokenizer} if settings.stop_strings else {}


def cut_middle(tokenizer: Any, prompt: str, length: int) -> str:
    """`prompt`, without its middle where it has more than `length` tokens (as LongBench and LV-Eval do it)."""
    ids = encode(tokenizer, prompt)
    if len(ids) <= length:
        return prompt
    half = length // 2
    first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return f"{first}{last}"


@dataclass(frozen=True)
class Budget:
    """A length in tokens to be filled with units (lines, sentences) of a text."""

    tokenizer: Any
    tokens: int

    def most(self, render: Callable[[int], str], least: int, guess: int) -> int:
        """The most units whose text fits; less than one unit's tokens stay free.

        `render(n)` gives the text with n units. Raises UserError if not even `least` units fit.
        """
        size = lru_cache(maxsize=None)(lambda units: len(encode(self.tokenizer, render(units))))
        require(
            size(least) <= self.tokens,
            f"the shortest text of this task has {size(least)} tokens, {self.tokens} are available: use a longer length",
        )
        units, too_many = max(least, guess), 0
        while True:
            cost = size(units) / units
            step = int((self.tokens - size(units)) // cost)
            if step < 0:
                too_many = units
            elif step == 0 or units + 1 == too_many:
                return units
            units = max(least, units + step)
            if too_many:
                units = min(units, too_many - 1)


def _start(tokenizer: Any) -> list[int]:
    # Found around a letter: of an empty text nothing tells what comes before it from what comes behind.
    whole: list[int] = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    return whole[: next(place for place in range(len(whole) + 1) if whole[place : place + len(bare)] == bare)]
