"""SparseCache: generation with it equals generation with all keys under the same plan, and it stores what the plan says."""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache

from attnsieve import UserError
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


@pytest.mark.skipif(not find_spec("triton") or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_triton_decodes_like_the_oracle():
    model = tiny("llama", num_hidden_layers=1)
    plan, ids = ragged_plan(model), tokens(2, 18)
    with apply(model, plan, backend="reference"):
        expected = logits(model, ids, use_cache=False)
    with apply(model, plan, backend="triton") as handle:
        got = in_steps(model, ids, handle.cache(18), [14, 1, 1, 2])
    close(got, expected)
    assert handle.report().layers[0].backends == {"triton": 2, "ragged": 2}


def test_left_padding_changes_nothing():
    model = tiny("qwen3")
    plan, texts = ragged_plan(model), [tokens(1, n, seed=n) for n in (9, 20, 17)]
    padded = torch.cat([torch.nn.functional.pad(text, (20 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(text), (20 - text.shape[1], 0)) for text in texts])
    with apply(model, plan) as handle:
        together = model.generate(padded, attention_mask=mask, max_new_tokens=15, past_key_values=handle.cache(40), **GREEDY)
        for b, text in enumerate(texts):
            alone = model.generate(text, max_new_tokens=15, past_key_values=handle.cache(40), **GREEDY)
            assert torch.equal(together.sequences[b, 20:], alone.sequences[0, text.shape[1] :])


def test_a_conversation_goes_on_in_the_same_cache_and_in_copies():
    model = tiny("llama")
    plan, prompt, more = ragged_plan(model), tokens(1, 15), tokens(1, 6, seed=5)
    with apply(model, plan) as handle:
        cache = handle.cache(80)
        first = model.generate(prompt, max_new_tokens=9, do_sample=False, past_key_values=cache)
        branch, text = copy.deepcopy(cache), torch.cat([first, more], dim=1)
        expected = model.generate(text, max_new_tokens=9, do_sample=False)
        assert torch.equal(model.generate(text, max_new_tokens=9, do_sample=False, past_key_values=cache), expected)
        assert torch.equal(model.generate(text, max_new_tokens=9, do_sample=False, past_key_values=branch), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model.generate(prompt, max_new_tokens=9, do_sample=False, past_key_values=cache), first)


def test_the_future_does_not_leak_and_dropped_keys_are_gone():
    model = tiny("llama", num_hidden_layers=1)
    plan = Plan.uniform(fingerprint(model), "sink(2) | window(5)")
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[:, 4:20] = (ids[:, 4:20] + 5) % 50 + 2
    with apply(model, plan) as handle:
        rest = [in_steps(model, text, handle.cache(40), [24, *[1] * 16])[:, 26:] for text in (ids, changed)]
    assert torch.equal(*rest)  # one layer: rows from 26 on read 0, 1 and five keys from 22 on


def test_memory_is_what_the_plan_says():
    model = tiny("llama", num_key_value_heads=3)
    rows = [[Pattern.parse(rule) for rule in ("window(8)", "columns(0, 50)", *["dense()"] * 2, *["sink(3) | window(2)"] * 2)]]
    rows.append([Pattern.parse("dense()")] * 6)
    plan = Plan(fingerprint(model), rows)
    with apply(model, plan) as handle, torch.no_grad():
        cache = handle.cache(100)
        planned = cache.report()
        model(tokens(2, 60), past_key_values=cache)
        report, width = cache.report(), 2 * 4 * 4  # K and V of width 4 in float32
    slots = (2 + 8) + 100 + (3 + 2)
    assert report.layers[0].nbytes == 2 * slots * width + 2 * 3 * 2 * 4  # and two numbers per row and KV head
    assert report.layers[0].share == planned.layers[0].share == slots / 300
    assert report.layers[1].nbytes == 2 * 3 * 60 * width
    assert report.share == (slots / 300 + 1) / 2
    assert cache.nbytes == report.nbytes == report.index_bytes + sum(layer.nbytes for layer in report.layers)
    assert "layers [1]: all keys (by plan" in str(report)
    assert "layers [0]: 38.3% of the keys" in str(report)


def test_all_keys_are_kept_until_every_row_is_past_the_corner():
    model = tiny("llama")
    plan, mask = ragged_plan(model, corner=9), torch.ones(2, 30, dtype=torch.long)
    mask[1, :23] = 0
    with apply(model, plan) as handle:
        cache = handle.cache(60)
        logits(model, tokens(2, 30), past_key_values=cache, attention_mask=mask)
        assert cache.layers[0].store is None
        mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
        logits(model, tokens(2, 2), past_key_values=cache, attention_mask=mask)
    assert cache.layers[0].store is not None
    assert cache.layers[0].keys.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    model = tiny("llama", dtype)
    plan, ids = ragged_plan(model), tokens(2, 30)
    with apply(model, plan) as handle:
        expected = in_steps(model, ids, DynamicCache(config=model.config), [20, *[1] * 10])
        got = in_steps(model, ids, handle.cache(30), [20, *[1] * 10])
    close(got, expected, 0.1 if dtype == torch.bfloat16 else 1e-12)


def test_autocast():
    model = tiny("llama")
    plan, ids = ragged_plan(model), tokens(2, 30)
    with apply(model, plan) as handle, torch.autocast("cpu", torch.bfloat16):
        expected = in_steps(model, ids, DynamicCache(config=model.config), [20, *[1] * 10])
        cache = handle.cache(30)
        got = in_steps(model, ids, cache, [20, *[1] * 10])
    close(got, expected, 0.1)
    assert cache.layers[0].store.memory.key.dtype == torch.bfloat16


def test_the_report_counts_steps():
    model = tiny("llama")
    with apply(model, ragged_plan(model), strict=True) as handle:
        model.generate(tokens(1, 12), max_new_tokens=5, do_sample=False, past_key_values=handle.cache(20))
    assert handle.report().layers[0].sparse == {"prefill": 1, "decode": 4}
    assert handle.report().layers[0].backends["ragged"] == 4


class TestRefusals:
    model = tiny("llama")

    def refused(self, reason, run, plan=None):
        with (
            apply(self.model, plan or ragged_plan(self.model)) as handle,
            torch.no_grad(),
            pytest.raises(UserError, match=reason),
        ):
            run(handle)

    @pytest.mark.parametrize(
        ("rule", "reason"),
        [
            ("dense()", "by plan"),
            ("random_blocks(1, block=4, seed=0)", "may read any earlier key"),
            ("top_blocks(2, block=64)", "chooses its keys from the input"),
        ],
    )
    def test_plans_that_drop_nothing(self, rule, reason):
        self.refused(
            f"no layer of this plan can drop keys .*{reason}",
            lambda handle: handle.cache(9),
            Plan.uniform(fingerprint(self.model), rule),
        )

    @pytest.mark.parametrize("room", [0, -1, 9.5, "8K", 2**31])
    def test_no_whole_number_of_tokens(self, room):
        self.refused("a cache has room for a whole number of tokens", lambda handle: handle.cache(room))

    def test_longer_texts_than_room(self):
        self.refused(
            "made for 10 tokens, these would be 11", lambda handle: self.model(tokens(1, 11), past_key_values=handle.cache(10))
        )

    def test_assisted_decoding(self):
        prompt = tokens(1, 17)
        prompt[:, 9:] = prompt[:, :8]
        self.refused(
            "cannot take tokens back",
            lambda handle: self.model.generate(
                prompt, max_new_tokens=9, prompt_lookup_num_tokens=3, past_key_values=handle.cache(60)
            ),
        )

    def test_a_removed_handle(self):
        with apply(self.model, ragged_plan(self.model)) as handle:
            cache = handle.cache(20)
        with pytest.raises(UserError, match="handle was removed"):
            handle.cache(20)
        with torch.no_grad(), pytest.raises(UserError, match="no longer applied"):
            self.model(tokens(1, 5), past_key_values=cache)
        self.refused("no longer applied", lambda handle: self.model(tokens(1, 5), past_key_values=cache))

    def test_another_model(self):
        other = tiny("llama")
        self.refused("given to another model", lambda handle: other(tokens(1, 5), past_key_values=handle.cache(20)))

    def test_masks_that_change(self):
        def run(handle, later):
            cache, mask = handle.cache(20), torch.ones(2, 10, dtype=torch.long)
            mask[1, :3] = 0
            self.model(tokens(2, 10), past_key_values=cache, attention_mask=mask)
            self.model(tokens(2, 1), past_key_values=cache, attention_mask=later(mask))

        grown = lambda mask: torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)  # noqa: E731
        self.refused(
            "padding changed in mid-text", lambda handle: run(handle, lambda mask: torch.ones(2, 11, dtype=torch.long))
        )
        self.refused("padding changed in mid-text", lambda handle: run(handle, lambda mask: None))
        self.refused("one sequence per batch row", lambda handle: run(handle, lambda mask: 1 - (1 - grown(mask)).flip(1)))
        with apply(self.model, ragged_plan(self.model)) as handle, torch.no_grad():
            run(handle, grown)

    def test_gradients(self):
        with apply(self.model, ragged_plan(self.model)) as handle, pytest.raises(UserError, match="carry no gradient"):
            self.model(tokens(1, 5), past_key_values=handle.cache(20))

    def test_another_batch(self):
        def run(handle):
            cache = handle.cache(20)
            self.model(tokens(2, 10), past_key_values=cache)
            self.model(tokens(3, 1), past_key_values=cache)

        self.refused("the batch or its padding changed", run)

    def test_dropout(self):
        model = tiny("llama", attention_dropout=0.1).train()
        with (
            apply(model, ragged_plan(model)) as handle,
            torch.no_grad(),
            pytest.raises(UserError, match="must stay dense here"),
        ):
            model(tokens(1, 5), past_key_values=handle.cache(20))
