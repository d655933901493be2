"""Padding and packing only shift positions: every text computes what it computes alone."""

import pytest
import torch
from transformers import StaticCache

from attnsieve import UserError
from attnsieve.hf import apply
from tests.hf_tiny import BACKENDS, close, logits, mixed_plan, oracle, tiny, tokens

LENGTHS = [19, 7, 1, 12]
FAMILIES = ["llama", "qwen2", "gemma3", "phi3", "smollm3"]


def padded(texts, side):
    """input_ids, attention_mask and position_ids (0 on padding) of texts padded to the longest."""
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def of_row(batch, values, row):
    return values[row][batch["attention_mask"][row].bool()]


@pytest.fixture
def texts():
    return [tokens(n, seed=n) for n in LENGTHS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_each_text_alone(family, side, texts):
    model = tiny(family)
    plan = mixed_plan(model)
    alone = [oracle(model, plan, text[None])[0] for text in texts]
    batch = padded(texts, side)
    with apply(model, plan, backend="reference") as handle:
        for use_cache in (False, True):
            got = logits(model, **batch, use_cache=use_cache)
            for row, expected in enumerate(alone):
                close(of_row(batch, got, row), expected)
    assert handle.report().layers[1].dense.total() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_position_ids_padding_only_turns_the_rotary_angles(backend, texts):
    model = tiny("llama")
    plan = mixed_plan(model)
    batch = padded(texts, "left")
    with apply(model, plan, backend=backend, strict=True):
        got = logits(model, batch["ids"], attention_mask=batch["attention_mask"])
    for row, text in enumerate(texts):
        close(of_row(batch, got, row), oracle(model, plan, text[None])[0], 1e-4)


@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 6}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_of_a_left_padded_batch_equals_each_alone(family, how, texts):
    model = tiny(family)
    batch = padded(texts, "left")
    options = {"max_new_tokens": 8, "do_sample": False}
    with apply(model, mixed_plan(model), backend="reference") as handle:
        alone = [model.generate(text[None], **options)[0, len(text) :] for text in texts]
        got = model.generate(batch["ids"], attention_mask=batch["attention_mask"], **options, **how)
    assert torch.equal(got[:, max(LENGTHS) :], torch.stack(alone))
    assert handle.report().layers[1].dense.total() == 0


def test_chunks_of_a_left_padded_static_cache(texts):
    model = tiny("llama")
    plan = mixed_plan(model)
    batch = padded(texts, "left")
    cache = StaticCache(config=model.config, max_cache_len=24)
    with apply(model, plan, backend="reference", strict=True):
        pieces = [
            logits(
                model,
                batch["ids"][:, at : at + 8],
                attention_mask=batch["attention_mask"][:, : at + 8],
                position_ids=batch["position_ids"][:, at : at + 8],
                past_key_values=cache,
            )
            for at in range(0, max(LENGTHS), 8)
        ]
    got = torch.cat(pieces, dim=1)
    for row, text in enumerate(texts):
        close(of_row(batch, got, row), oracle(model, plan, text[None])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_each_alone(family, texts):
    model = tiny(family)
    plan = mixed_plan(model)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with apply(model, plan, backend="reference") as handle:
        got = logits(model, torch.cat(texts)[None], position_ids=positions, use_cache=False)[0]
    for text, part in zip(texts, got.split(LENGTHS), strict=True):
        close(part, oracle(model, plan, text[None])[0])
    assert handle.report().layers[1].dense.total() == 0


def test_two_packed_rows_that_differ(texts):
    model = tiny("llama")
    plan = mixed_plan(model)
    other = texts[::-1]
    positions = [torch.cat([torch.arange(len(text)) for text in row]) for row in (texts, other)]
    with apply(model, plan, backend="reference", strict=True):
        ids = torch.stack([torch.cat(texts), torch.cat(other)])
        got = logits(model, ids, position_ids=torch.stack(positions), use_cache=False)
    for row, parts in zip((texts, other), got, strict=True):
        for text, part in zip(row, parts.split([len(text) for text in row]), strict=True):
            close(part, oracle(model, plan, text[None])[0])


@pytest.mark.parametrize(
    "extra", [{}, {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "position_ids": None}], ids=str
)
def test_packed_documents_that_no_mask_separates_are_refused(extra):
    model = tiny("llama")
    inputs = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])} | extra
    with apply(model, mixed_plan(model), backend="reference"), pytest.raises(UserError, match="use_cache=False"):
        logits(model, tokens(1, 9), **inputs)


def test_a_prompt_with_a_hole_stays_dense_by_name():
    model = tiny("llama")
    ids, hole = tokens(1, 9), torch.ones(1, 9, dtype=torch.long)
    hole[0, 4] = 0
    model.set_attn_implementation("sdpa")
    expected = logits(model, ids, attention_mask=hole)
    with apply(model, mixed_plan(model), backend="reference") as handle:
        got = logits(model, ids, attention_mask=hole)
    close(got, expected)
    assert [reason for reason in handle.report().unplanned if "gaps" in reason]
