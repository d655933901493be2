"""A character tokenizer and a text with something to learn, for training tests."""

from __future__ import annotations

import random
import string

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SYMBOLS = ["<eos>", "<unk>", *string.ascii_lowercase, " ", "\n", "."]


def characters() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def sentences(count: int, seed: int = 0) -> str:
    """Lines of a few fixed words: far from random at the level of characters."""
    choose = random.Random(seed)
    words = ["sieve", "attends", "window", "to", "the", "last", "token"]
    return "".join(" ".join(choose.choices(words, k=6)) + ".\n" for _ in range(count))
