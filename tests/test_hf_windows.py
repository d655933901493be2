"""Layers with sliding windows of the model's own follow the part of the plan inside the window, whatever the cache has dropped."""

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.evaluation import layer_fidelity
from attnsieve.fitting import fit, fit_budget
from attnsieve.hf import apply, fingerprint, measure, profile, sparse_layer
from attnsieve.hf.masks import DROPPED, OFFSET, PADDING, spans_within
from attnsieve.hf.sparse_layer import _with_dropped as with_dropped
from attnsieve.layout import compile_layout, settled_layout, settled_row
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan
from tests.hf_tiny import GQA, HYBRID, close, logits, oracle, tiny, tokens, window_mask
from tests.test_hf_architectures import built, in_steps

STEPS = [13, 1, 9, 1, 1, 8, 1, 1, 1, 1, 3]
N = sum(STEPS)
FAMILIES = {
    "mistral": lambda: tiny("mistral", sliding_window=8),
    "gemma3": lambda: tiny("gemma3"),
    "qwen2": lambda: built("Qwen2Config", **GQA, **HYBRID, use_sliding_window=True),
    "cohere2": lambda: built("Cohere2Config", **GQA, **HYBRID),
    "exaone4": lambda: built("Exaone4Config", **GQA, **HYBRID),
    "olmo3": lambda: built("Olmo3Config", **GQA, **HYBRID),
}


def rules(corner=20):
    generator = torch.Generator().manual_seed(1)
    captured = (torch.rand(corner, corner, generator=generator) < 0.4) | torch.eye(corner, dtype=torch.bool)
    start = f"start={corner}"
    return [
        Pattern.parse("sink(2) | window(5)"),
        Pattern.parse("columns(0, 3, 11, 29) | diagonals(0, 2, 7, 15, 16)"),
        Pattern.of(Captured.from_mask(captured.tril())) | Pattern.parse(f"columns(0, {start}) | diagonals(0, 1, {start})"),
        Pattern.parse("dilated(6, step=3)"),
        Pattern.parse("dense()"),
        Pattern.parse("sink(1) | window(40)"),
    ]


def mixed(model):
    mark = fingerprint(model)
    return Plan(mark, [[rules()[(h + 2 * row) % 6] for h in range(mark.heads)] for row in range(mark.layers)])


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_holds_inside_the_window_in_prompts_chunks_and_steps(family, backend):
    model = FAMILIES[family]()
    plan, ids = mixed(model), tokens(2, N)
    stock = logits(model, ids, use_cache=False)
    with apply(model, plan, backend=backend, strict=True) as handle:
        whole = logits(model, ids, use_cache=False)
        close(in_steps(model, ids, tr.DynamicCache(config=model.config), STEPS), whole)
    assert handle.report().unplanned == {}
    close(whole, oracle(model, plan, ids))
    assert (whole - stock).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static", "ragged"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_generation_with_padding_is_that_of_each_text_alone(family, cache):
    model = FAMILIES[family]()
    plan, texts = mixed(model), [tokens(length, seed=length) for length in (5, 21, 14)]
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(longest) >= longest - len(text) for text in texts]).long()
    options = {"max_new_tokens": 24, "do_sample": False}
    with apply(model, plan, backend="reference", strict=True) as handle:
        alone = []
        for text in texts:
            for _ in range(24):
                text = torch.cat([text, logits(model, text[None], use_cache=False)[0, -1:].argmax(-1)])
            alone.append(text[-24:])
        if cache == "static":
            options["past_key_values"] = tr.StaticCache(config=model.config, max_cache_len=64)
        if cache == "ragged":
            if family == "mistral":
                with pytest.raises(UserError, match="no layer of this plan can drop keys"):
                    handle.cache(64)
                return
            options["past_key_values"] = handle.cache(64)
        got = model.generate(ids, attention_mask=mask, **options)[:, longest:]
    assert torch.equal(got, torch.stack(alone))


def test_packed_documents_keep_their_windows_to_themselves():
    model = FAMILIES["gemma3"]()
    plan, lengths = mixed(model), (25, 4, 30)
    texts = [tokens(length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with apply(model, plan, backend="reference", strict=True):
        packed = logits(model, torch.cat(texts)[None], position_ids=positions, use_cache=False)
        alone = torch.cat([logits(model, text[None], use_cache=False)[0] for text in texts])
    close(packed[0], alone)


def test_whole_layers_of_dense_are_the_model():
    model, ids = FAMILIES["mistral"](), tokens(2, N)
    rows = [[Pattern.parse("dense()")] * 3 + [Pattern.parse("window(100)")]] * 2
    with apply(model, Plan(fingerprint(model), rows), strict=True) as handle:
        got = logits(model, ids, use_cache=False)
    close(got, oracle(model, Plan.uniform(fingerprint(model), "dense()"), ids))
    assert handle.report().sparse_calls == 2


@pytest.mark.parametrize("window", [1, 5, 8, 16, 39, 40, 41])
def test_layouts_within_a_window_are_both_rules(window):
    patterns, n = rules(), 40
    i, j = torch.arange(n)[:, None], torch.arange(n)
    expected = torch.stack([pattern.keep(i, j) & (i - j < window) for pattern in patterns])
    layout = compile_layout(patterns, n, window=window)
    assert torch.equal(torch.stack([layout.keep(0, head, i, j) for head in range(6)]), expected)


@pytest.mark.parametrize("window", [5, 8, 16])
def test_settled_rows_are_those_of_the_layout_wherever_they_are(window):
    layout = compile_layout([*rules(), Pattern.parse("window(3)")], 80, window=window)
    first = settled_row(layout, window)
    assert first == max(20, 29 + window)
    settled = settled_layout(layout, 40)
    i, j = torch.arange(first, 80)[:, None], torch.arange(80)
    shift = first - window + 1
    for head in range(7):
        moved = settled.keep(0, head, (i - shift).clamp_max(39), (j - shift).clamp(0, 39))
        seen = (i - shift < 40) & (j >= shift) & (j - shift < 40)
        assert torch.equal(moved & seen, layout.keep(0, head, i, j) & seen)


def test_late_steps_read_what_the_cache_stores(monkeypatch):
    """Copies that a step makes of a windowed layer's keys end once no row depends on where the text began."""
    model, ids, copied = FAMILIES["mistral"](), tokens(2, 70), []
    plan = mixed(model)
    monkeypatch.setattr(
        sparse_layer, "_with_dropped", lambda states, slots: copied.append(slots) or with_dropped(states, slots)
    )
    with apply(model, plan, backend="portable", strict=True):
        steps = in_steps(model, ids, tr.DynamicCache(config=model.config), [20] + [1] * 50)
    assert set(copied) == set(range(21, 38))
    close(steps, oracle(model, plan, ids))


def test_blocks_are_not_cut():
    with pytest.raises(UserError, match="whole blocks, which a window of 8 would cut through"):
        compile_layout([Pattern.parse("random_blocks(1, block=4)")], 40, window=8)
    compile_layout([Pattern.parse("random_blocks(1, block=4)")], 40, window=40)


def noted(mask, offset=0, dropped=0, padding=None):
    mask = mask[None, None].contiguous() if mask.ndim == 2 else mask
    for name, value in ((OFFSET, offset), (DROPPED, dropped), (PADDING, padding)):
        setattr(mask, name, value)
    return mask


@pytest.mark.parametrize("wrong", [3, 5, 12])
def test_masks_of_other_windows_are_not_explained(wrong):
    assert isinstance(spans_within(noted(window_mask(12, wrong)[0]), 4), str)
    assert isinstance(spans_within(window_mask(12, 4)[None], 4), str)
    assert spans_within(noted(window_mask(12, 4)[0]), 4).spans.rows() == [(0, 0, 12, 0, 12)]


def test_steps_after_keys_were_dropped_count_from_the_callers_padding():
    step = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    padding = torch.arange(12) >= torch.tensor([[0], [3]])
    found = spans_within(noted(step, 3, 8, padding), 4)
    assert found.spans.rows() == [(0, 0, 1, 0, 12), (1, 0, 1, 3, 9)]
    assert found.stored.rows() == [(0, 0, 1, 0, 4), (1, 0, 1, 0, 4)]
    assert found.earliest == 8
    assert spans_within(noted(step, 3, 8), 4).spans.rows() == [(0, 0, 1, 0, 12), (1, 0, 1, 0, 12)]
    hole = padding.clone()
    hole[0, 5] = False
    assert isinstance(spans_within(noted(step, 3, 8, hole), 4), str)
    hole[0, 8] = False
    assert isinstance(spans_within(noted(step & hole[:, None, None, 8:], 3, 8, hole), 4), str)


def test_padding_on_the_right_is_left_out():
    model = FAMILIES["gemma3"]()
    plan, text = mixed(model), tokens(21)
    ids = torch.stack([torch.nn.functional.pad(text, (0, 30)), tokens(51)])
    mask = (torch.arange(51) < torch.tensor([[21], [51]])).long()
    with apply(model, plan, backend="reference", strict=True):
        padded = logits(model, ids, attention_mask=mask, use_cache=False)
        close(padded[0, :21], logits(model, text[None], use_cache=False)[0])
        close(padded[1:], logits(model, ids[1:], use_cache=False))


@pytest.mark.parametrize("hole", [slice(6, 7), slice(6, 12), slice(6, 14)])
def test_holes_in_the_padding_stay_dense_by_name(hole):
    model = FAMILIES["mistral"]()
    ids, mask = tokens(1, 21), torch.ones(1, 21, dtype=torch.long)
    mask[0, hole] = 0
    model.set_attn_implementation("sdpa")
    expected = logits(model, ids, attention_mask=mask)
    with apply(model, mixed(model), backend="reference") as handle:
        close(logits(model, ids, attention_mask=mask), expected)
    assert handle.report().sparse_calls == 0


def test_windows_noted_on_layers_of_full_attention_are_not_theirs():
    maps = profile(FAMILIES["exaone4"](), [tokens(1, 40)], pcl=40, lengths=(), progress=False).maps
    assert (maps.tril(-16).sum((1, 2, 3)) > 0).tolist() == [False, True]


def test_layers_with_windows_are_profiled_fitted_and_measured():
    model = FAMILIES["gemma3"]()
    texts = [tokens(2, 48)]
    plan = fit(profile(model, texts, pcl=12, lengths=(40,), progress=False), preset="robust")
    measured = measure(model, texts, ["sink(1) | window(4)", "window(12)"], progress=False)
    whole = measured.candidates.index("dense()")
    share = compile_layout([Pattern.parse("window(16)")], 48).density(48).item()
    assert measured.density[0, whole, 0].tolist() == pytest.approx([share] * 6)
    assert (measured.error[0, whole] < 1e-9).all()
    assert (measured.retained[0, whole] > 1 - 1e-5).all()
    budget = fit_budget(measured, density=0.4)
    for one in (plan, budget):
        with apply(model, one, strict=True):
            got = logits(model, tokens(1, 48), use_cache=False)
        close(got, oracle(model, one, tokens(1, 48)))
    found = layer_fidelity(model, budget, tokens(48).tolist())
    close(found.density.float(), budget.density)
    with pytest.raises(
        UserError, match=r"layer 0 cannot be measured \(sliding window.* cannot be cut to\): measure fixed masks"
    ):
        measure(model, texts, ["top_blocks(1, block=4) | window(2)"], progress=False)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_texts_are_measured_up_to_the_context_where_the_window_is_no_shorter(length):
    model, text = tiny("mistral", sliding_window=16, max_position_embeddings=16), tokens(1, length)
    plan = Plan.uniform(fingerprint(model), "window(16)")
    if length > 16:
        for run in (measure, lambda model, texts, _, **__: layer_fidelity(model, plan, texts[0][0].tolist())):
            with pytest.raises(UserError, match=r"beyond the model's context of 16|more than the model's 16 positions"):
                run(model, [text], ["window(16)"], progress=False)
        return
    assert measure(model, [text], ["window(16)"], progress=False).error.max() == 0
    assert layer_fidelity(model, plan, text[0].tolist()).density.min() == 1
    with apply(model, plan, strict=True):
        got = logits(model, text, use_cache=False)
    close(got, oracle(model, plan, text))


def test_layers_called_with_a_window_that_they_do_not_note_are_not_measured():
    model = built("MiniMaxConfig", **GQA, num_local_experts=2, sliding_window=8, layer_types=["full_attention"] * 2)
    text, plan = tokens(1, 20), Plan.uniform(fingerprint(model), "window(4)")
    with pytest.raises(UserError, match=r"layer 0 cannot be measured \(sliding window: this call has another \(8\)"):
        measure(model, [text], ["window(8)"], progress=False)
    found = layer_fidelity(model, plan, text[0].tolist())
    assert (found.density == 1).all()
    assert (found.error == 0).all()
    with apply(model, plan) as handle:
        logits(model, text)
    assert handle.report().sparse_calls == 0


@pytest.mark.parametrize(("name", "changes"), [("DogeConfig", {}), ("MoshiConfig", {"sliding_window": 8})])
def test_fidelity_of_layers_whose_masks_keep_them_dense_is_that_of_dense(name, changes):
    """Doge adds a mask of its own; Moshi makes none for its window."""
    model, text = built(name, **GQA, **changes), tokens(1, 20)
    plan = Plan.uniform(fingerprint(model), "window(4)")
    with apply(model, plan) as handle:
        logits(model, text, use_cache=False)
    assert handle.report().sparse_calls == 0
    found = layer_fidelity(model, plan, text[0].tolist())
    assert (found.density == 1).all()
    assert (found.error == 0).all()
    with pytest.raises(UserError, match=r"layer 0 cannot be (measured|observed)"):
        measure(model, [text], ["window(4)"], progress=False)
