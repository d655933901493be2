"""A tokenizer for a model that is trained from nothing: byte-level BPE learned from its own text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attnsieve.errors import require

END = "<eos>"
LEAST = 257


def byte_level_tokenizer(pieces: Iterable[str], vocabulary: int = LEAST) -> PreTrainedTokenizerFast:
    """At most `vocabulary` tokens: the 256 bytes, an end-of-sequence token, and the most frequent joins of them in `pieces`.

    With 257, the least, there are no joins and the text is not read. The same text gives the same tokenizer.
    Raises UserError for fewer.
    """
    require(vocabulary >= LEAST, f"a byte-level vocabulary holds at least {LEAST} tokens, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces if vocabulary > LEAST else (), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
