"""A tiny random model and a byte-level tokenizer with one merge per pair of letters that matter, made from nothing."""

from functools import cache
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnsieve.evaluation.density import pattern_density
from attnsieve.plan import Plan

CHAT = (
    "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[bot] {% endif %}"
)

# Random weights large enough that attention is not flat.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}


def tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, but a space and the word after it may join: " cat" is one token. `bos`: adds <s> by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("a", "t"), ("Ġc", "at")]
    words = ["<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if bos:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = CHAT
    return made


@cache
def model(*, layers: int = 2, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Of `SIZES`, random."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        **SIZES,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def plan_density(plan: Plan, length: int) -> float:
    """Mean density of all heads of a static plan at `length`, for a model without windows."""
    return fmean(pattern_density(pattern, length) for row in plan.patterns for pattern in row)
