"""Patterns that choose from the input work through the adapter: texts choose alone, whatever they are batched with."""

import pytest
import torch

from attnsieve.hf import apply, fingerprint
from attnsieve.plan import Plan
from tests.hf_tiny import close, logits, tiny, tokens

RULES = [
    "top_blocks(1, block=4) | window(2)",
    "vertical_slash(mass=0.6, probe=4) | window(1)",
    'probed_blocks(mass=0.6, block=4, share="kv") | window(2)',
    "heavy_hitters(3, 2, block=4)",
    'voted_keys(3, probe=2, pool=1, share="kv") | window(2)',
    "last_queries(3, block=4) | window(2)",
    "dense_prefill() | voted_keys(4, probe=2)",
]
LENGTHS = [19, 7, 12]


@pytest.fixture
def texts():
    return [tokens(n, seed=n) for n in LENGTHS]


@pytest.fixture(params=RULES)
def case(request):
    model = tiny("llama", torch.float64)
    return model, Plan.uniform(fingerprint(model), request.param)


def test_a_rule_that_chooses_everything_is_the_model(texts):
    model = tiny("llama", torch.float64)
    model.set_attn_implementation("sdpa")
    expected = logits(model, texts[0][None])
    with apply(model, Plan.uniform(fingerprint(model), "top_blocks(100, block=4)"), backend="reference", strict=True):
        close(logits(model, texts[0][None]), expected, 1e-9)


def test_padded_and_packed_texts_choose_alone(case, texts):
    model, plan = case
    longest = max(LENGTHS)
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :], mask[row, longest - len(text) :] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with apply(model, plan, backend="reference", strict=True) as handle:
        alone = [logits(model, text[None])[0] for text in texts]
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        restarts = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        packed = logits(model, torch.cat(texts)[None], position_ids=restarts, use_cache=False)[0].split(LENGTHS)
    for row, text in enumerate(texts):
        close(batch[row, longest - len(text) :], alone[row], 1e-9)
        close(packed[row], alone[row], 1e-9)
    assert handle.report().sparse_calls == 2 * (len(texts) + 2)


def test_generation_counts_every_choice_as_sparse(case, texts):
    model, plan = case
    with apply(model, plan, backend="reference", strict=True) as handle:
        model.generate(texts[0][None], max_new_tokens=4, do_sample=False)
    assert handle.report().layers[0].sparse == {"prefill": 1, "decode": 3}
