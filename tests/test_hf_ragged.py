"""SparseCache: generation with it equals generation with all keys under the same plan, and it stores what the plan says."""

import pytest
import torch
from transformers import DynamicCache

from attnsieve.hf import apply, fingerprint
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from tests.hf_tiny import close, logits, mixed_plan, tiny, tokens

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "smollm3"]
RULES = [
    "sink(2) | window(5)",
    "columns(0, 3, 11, 40) | diagonals(0, 2, 7)",
    "diagonals(0, 1, 4, 12)",
    "dilated(6, step=3)",
    "window(3) | columns(2, 30)",
    "columns(1, 5) | window(1)",
]


def ragged_plan(model, corner=0):
    """A different rule for every head; with `corner`, rows below it follow captured bits."""
    mark = fingerprint(model)
    captured = mixed_plan(model).patterns[0][2] if corner else None
    rules = [Pattern.parse(rule) for rule in RULES]
    if captured is not None:
        rules[2] = captured
    rows = [[rules[(h + 2 * layer) % 6] for h in range(mark.heads)] for layer in range(mark.layers)]
    return Plan(mark, rows)


def in_steps(model, ids, cache, steps, **inputs):
    pieces, at = [], 0
    for piece in ids.split(steps, dim=1):
        at += piece.shape[1]
        mask = {"attention_mask": inputs["attention_mask"][:, :at]} if "attention_mask" in inputs else {}
        pieces.append(logits(model, piece, past_key_values=cache, **mask))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("corner", [0, 9])
@pytest.mark.parametrize("steps", [[30], [1] * 30, [11, 1, 1, 7, 5, 1, 4], [1, 29], [28, 2]], ids=str)
def test_pieces_equal_the_whole(steps, corner, backend):
    model = tiny("llama")
    plan, ids = ragged_plan(model, corner), tokens(2, 30)
    with apply(model, plan, backend=backend) as handle:
        whole = logits(model, ids, use_cache=False)
        cache = handle.cache(32)
        close(in_steps(model, ids, cache, steps), whole)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_that_with_all_keys(family):
    model = tiny(family)
    plan, prompt = ragged_plan(model), tokens(2, 23)
    with apply(model, plan) as handle:
        expected = model.generate(prompt, max_new_tokens=30, **GREEDY)
        got = model.generate(prompt, max_new_tokens=30, past_key_values=handle.cache(60), **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(
    "how",
    [
        {"prefill_chunk_size": 5},
        {"num_beams": 3, "do_sample": False, "output_logits": False},
        {"num_beams": 2, "num_return_sequences": 2, "output_logits": False},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("corner", [0, 9])
def test_ways_of_generating(how, corner):
    model = tiny("llama")
    plan, prompt, mask = ragged_plan(model, corner), tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :6], mask[2, :19] = 0, 0
    results = []
    with apply(model, plan) as handle:
        for cache in (DynamicCache(config=model.config), handle.cache(50)):
            torch.manual_seed(3)
            settings = GREEDY | how | {"past_key_values": cache, "attention_mask": mask}
            results.append(model.generate(prompt, max_new_tokens=30, **settings).sequences)
    assert torch.equal(*results)
