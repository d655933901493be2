"""However a text reaches the model (whole, in chunks, token by token, drafted), its logits are those of the whole text."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from attnsieve.hf import apply, fingerprint
from attnsieve.plan import Plan
from tests.hf_tiny import BACKENDS, VOCAB, close, logits, mixed_plan, oracle, tiny, tokens

FAMILIES = ["llama", "qwen3", "gemma3", "mistral"]
CACHES = {
    "dynamic": lambda model, room: DynamicCache(config=model.config),
    "static": lambda model, room: StaticCache(config=model.config, max_cache_len=room),
}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def in_steps(model, ids, cache, steps):
    """Logits of `ids` fed in pieces of the given sizes."""
    pieces = ids.split(steps, dim=1)
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in pieces], dim=1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[30], [1] * 30, [11, 1, 1, 7, 5, 1, 4], [1, 29], [28, 2]], ids=str)
def test_pieces_equal_the_whole(family, cache, steps):
    model = tiny(family)
    plan = mixed_plan(model)
    ids = tokens(2, 30)
    expected = oracle(model, plan, ids)
    with apply(model, plan, backend="reference") as handle:
        close(in_steps(model, ids, CACHES[cache](model, 37), steps), expected)
    full_layer = handle.report().layers[-1]
    assert full_layer.dense.total() == 0
    if cache == "dynamic":
        phases = [(size == 1 and "decode") or (at and "chunk") or "prefill" for at, size in enumerate(steps)]
        assert full_layer.sparse == {phase: phases.count(phase) for phase in set(phases)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_slots_of_a_static_cache_are_never_read(backend):
    model = tiny("llama")
    plan = mixed_plan(model)
    ids = tokens(1, 20)
    expected = oracle(model, plan, ids)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with apply(model, plan, backend=backend):
        first = logits(model, ids[:, :9], past_key_values=cache)
        for layer in cache.layers:
            layer.keys[:, :, 9:], layer.values[:, :, 9:] = torch.nan, torch.nan
        rest = in_steps(model, ids[:, 9:], cache, [1, 6, 4])
    close(torch.cat([first, rest], dim=1), expected)


@pytest.mark.parametrize("cache", [None, *CACHES])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_future_does_not_leak(family, cache):
    model = tiny(family)
    ids, at = tokens(2, 26), 13
    changed = ids.clone()
    changed[:, at:] = (ids[:, at:] - 2 + 7) % (VOCAB - 2) + 2

    def run(text):
        if cache is None:
            return logits(model, text, use_cache=False)
        return in_steps(model, text, CACHES[cache](model, 40), [9, 12, 1, 4])

    with apply(model, mixed_plan(model), backend="reference"):
        a, b = run(ids), run(changed)
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


def greedy_by_whole_forwards(model, ids, steps):
    """Tokens and logits of greedy decoding without any cache."""
    rows = []
    for _ in range(steps):
        rows.append(logits(model, ids, use_cache=False)[:, -1])
        ids = torch.cat([ids, rows[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(rows)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_equals_whole_forwards(how, backend):
    model = tiny("llama")
    prompt = tokens(1, 17)
    prompt[:, 9:] = prompt[:, :8]
    with apply(model, mixed_plan(model), backend=backend, strict=True) as handle:
        expected, rows = greedy_by_whole_forwards(model, prompt, 12)
        got = model.generate(prompt, max_new_tokens=12, **GREEDY, **how)
    assert torch.equal(got.sequences, expected)
    close(torch.stack(got.logits), rows)
    assert handle.report().unplanned == {}


def test_assisted_decoding_equals_whole_forwards():
    model, draft = tiny("llama"), tiny("llama")
    with torch.no_grad():
        draft.lm_head.weight.add_(torch.randn(draft.lm_head.weight.shape) * 0.05)
    prompt = tokens(1, 11)
    with apply(model, mixed_plan(model), backend="reference", strict=True) as handle:
        expected, _ = greedy_by_whole_forwards(model, prompt, 14)
        got = model.generate(prompt, max_new_tokens=14, assistant_model=draft, **GREEDY)
    assert torch.equal(got.sequences, expected)
    assert handle.report().layers[0].sparse["chunk"] > 0, "no draft was verified with a past, so this test proves nothing"


def test_beam_search_under_a_plan_equals_uncached():
    model = tiny("qwen3")
    prompt = tokens(2, 10)
    with apply(model, mixed_plan(model), backend="reference", strict=True):
        cached = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False)
        whole = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)


def test_compiled_decoding_equals_whole_forwards():
    model = tiny("llama", num_hidden_layers=1)
    prompt = tokens(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model.forward, backend="eager", dynamic=False)
    with apply(model, mixed_plan(model), backend="reference", strict=True) as handle:
        ids, expected = greedy_by_whole_forwards(model, prompt, 4)
        rows = [logits(model, prompt, past_key_values=cache)[:, -1]]
        for at in range(9, 12):
            with torch.no_grad():
                rows.append(step(input_ids=ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
    close(torch.stack(rows), expected)
    assert handle.report().layers[0].sparse["decode"] == 3


def test_generation_crosses_layout_capacities():
    model = tiny("llama")
    prompt = tokens(1, 250)
    with apply(model, mixed_plan(model), backend="reference"):
        expected, _ = greedy_by_whole_forwards(model, prompt, 9)
        got = model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert torch.equal(got, expected)


def test_sliding_layers_follow_one_rule_at_every_length():
    model = tiny("gemma3")
    plan = Plan.uniform(fingerprint(model), "columns(0, 10, 20) | window(3)")
    prompt = tokens(1, 12)
    with apply(model, plan, backend="reference") as handle:
        expected, _ = greedy_by_whole_forwards(model, prompt, 20)
        got = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, expected)
    assert handle.report().unplanned == {}
