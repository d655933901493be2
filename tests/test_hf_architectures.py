"""Architectures whose attention is not Llama's: each works exactly, stays dense by name, or is refused; none answers wrongly."""

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.evaluation import layer_fidelity
from attnsieve.hf import apply, fingerprint, measure, profile
from attnsieve.patterns import Pattern, dense
from attnsieve.plan import Plan
from tests.hf_tiny import GQA, MHA, SIZES, close, head_masks, logits, oracle, tokens

EXPERTS = {"num_local_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "head_dim": 4}
INDEXED = MHA | EXPERTS | MLA | {"n_group": 1, "topk_group": 1, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
SHARED = {
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
RULE = "sink(2) | window(4)"


def built(name, **changes):
    """A random model of the configuration class `name`, skipped where this transformers does not have it."""
    if not hasattr(tr, name):
        pytest.skip(f"transformers {tr.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(tr, name)(**(SIZES | changes))
    model = tr.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def gemma4(**changes):
    return built("Gemma4TextConfig", **(GQA | {"head_dim": 4, "global_head_dim": 8, "sliding_window": 8} | SHARED | changes))


def in_steps(model, ids, cache, steps):
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in ids.split(steps, dim=1)], dim=1)


def test_a_window_that_only_the_configuration_knows_holds_too():
    model = built("PhimoeConfig", **GQA, **EXPERTS, sliding_window=8)
    plan, ids = Plan.uniform(fingerprint(model), "columns(0, 5) | diagonals(0, 7, 9)"), tokens(1, 20)
    with apply(model, plan, backend="reference", strict=True):
        got = in_steps(model, ids, tr.DynamicCache(config=model.config), [7, 1, 5, 1, 6])
    close(got, oracle(model, plan, ids))


def test_layers_with_heads_of_their_own_width_follow_the_plan():
    model = gemma4(num_kv_shared_layers=0)
    plan, ids = Plan.uniform(fingerprint(model), RULE), tokens(2, 20)
    with apply(model, plan, backend="reference") as handle:
        whole = logits(model, ids, use_cache=False)
        close(in_steps(model, ids, handle.cache(20), [7, 1, 5, 1, 6]), whole)
    assert handle.report().unplanned == {}
    close(whole, oracle(model, plan, ids))
    other = gemma4(num_kv_shared_layers=0, global_head_dim=12)
    with pytest.raises(UserError, match="config_hash"):
        apply(other, plan)


def test_layers_with_kv_heads_of_their_own_can_be_profiled_but_share_no_cache():
    model = gemma4(num_kv_shared_layers=0, attention_k_eq_v=True, num_global_key_value_heads=1)
    assert fingerprint(model).kv_heads == 1
    profile(model, [tokens(20).tolist()], pcl=8, lengths=(16,), progress=False)
    with (
        apply(model, Plan.uniform(fingerprint(model), RULE)) as handle,
        pytest.raises(UserError, match="differ in their KV heads"),
    ):
        handle.cache(20)


def test_plans_have_one_number_of_query_heads():
    model = gemma4()
    model.config.per_layer_config = {1: {"num_attention_heads": 3}}
    with pytest.raises(UserError, match=r"differ in their query heads: \[3, 6\]"):
        fingerprint(model)


@pytest.mark.parametrize("rule", [RULE, "dense()"])
@pytest.mark.parametrize(("cache", "keep"), [("dynamic", 1), ("dynamic", 5), ("static", 1), ("static", 5)])
@pytest.mark.parametrize("window", [8, 64])
def test_layers_that_run_for_the_last_queries_alone_read_their_own_rows(rule, cache, keep, window):
    model = gemma4(sliding_window=window)
    ids = tokens(1, 20)
    stock = logits(model, ids, use_cache=False)
    with apply(model, Plan.uniform(fingerprint(model), rule), backend="reference"):
        whole = logits(model, ids, use_cache=False)
        past = tr.StaticCache(config=model.config, max_cache_len=30) if cache == "static" else None
        close(logits(model, ids, past_key_values=past, logits_to_keep=keep), whole[:, -keep:])
    assert torch.allclose(whole, stock, atol=2e-5) == (rule == "dense()")


@pytest.mark.parametrize("name", ["Gemma3nTextConfig", "Gemma4TextConfig"])
def test_models_whose_layers_share_keys_need_no_mask_for_whole_texts(name, monkeypatch):
    made = []
    monkeypatch.setattr("attnsieve.hf.locate.spans_of_mask", made.append)
    model = built(name, **(GQA | SHARED | {"head_dim": 4, "sliding_window": 64, "max_position_embeddings": 64}))
    plan, ids = Plan.uniform(fingerprint(model), RULE), tokens(2, 20)
    with apply(model, plan, backend="reference") as handle:
        whole = logits(model, ids, use_cache=False)
        steps = in_steps(model, ids, tr.DynamicCache(config=model.config), [13, 1, 1, 1, 1, 1, 1, 1])
    assert handle.report().unplanned == {}
    assert made == []
    close(whole, oracle(model, plan, ids))
    close(steps, whole)


@pytest.mark.parametrize("name", ["DeepseekV32Config", "GlmMoeDsaConfig"])
def test_models_with_an_indexer_of_their_own_are_refused(name):
    model = built(name, **INDEXED)
    with apply(model, Plan.uniform(fingerprint(model), RULE)), pytest.raises(UserError, match="an indexer of its own"):
        logits(model, tokens(1, 9))


def test_models_with_compressed_keys_are_refused():
    kinds = ["sliding_attention", "heavily_compressed_attention"]
    wide = {"head_dim": 8, "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2}
    model = built("DeepseekV4Config", **MHA, **EXPERTS, **wide, layer_types=kinds, index_head_dim=8, index_n_heads=2)
    with pytest.raises(UserError, match="layer 1 of deepseek_v4 attends to compressed keys"):
        fingerprint(model)


def test_layers_that_attend_twice_are_refused_a_cache_of_ours():
    model = built("DiffLlamaConfig", **MHA)
    ids = tokens(1, 12)
    with apply(model, Plan.uniform(fingerprint(model), RULE), backend="reference") as handle:
        close(in_steps(model, ids, tr.DynamicCache(config=model.config), [7, 1, 4]), logits(model, ids, use_cache=False))
        with pytest.raises(UserError, match="attends twice to what it stores"):
            logits(model, ids, past_key_values=handle.cache(20))


def test_layers_that_attend_twice_count_once():
    model, ids = built("DiffLlamaConfig", **MHA), tokens(1, 12)
    measured = measure(model, [ids], [RULE], progress=False)
    assert measured.candidates == (RULE, "dense()")
    keep = head_masks([Pattern.parse(RULE)], 12)
    close(measured.density[0, 0], torch.full((2, 4), float(keep.sum() / 78)))
    close(measured.retained[0, 1], torch.ones(2, 4))
    plan = Plan.uniform(fingerprint(model), RULE)
    before = layer_fidelity(model, plan, ids[0].tolist())
    with torch.no_grad():
        values = model.model.layers[1].self_attn.v_proj.weight
        values.copy_(values.roll(len(values) // 2, 0))
    close(layer_fidelity(model, plan, ids[0].tolist()).error[1], before.error[1], 1e-5)


def test_a_cache_is_refused_where_the_configuration_counts_other_kv_heads():
    model = built("JetMoeConfig", **(EXPERTS | {"num_experts_per_tok": 2}), num_key_value_heads=2, kv_channels=8)
    with apply(model, Plan.uniform(fingerprint(model), RULE)) as handle, pytest.raises(UserError, match="has 4 KV heads"):
        logits(model, tokens(1, 12), past_key_values=handle.cache(20))


def test_sinks_of_each_token_are_left_to_the_models_own_code(monkeypatch):
    model = built("LlamaConfig", **GQA)
    called = []

    def eager(module, query, key, value, mask, **options):
        called.append(options["sinks"])
        return torch.zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None

    monkeypatch.setattr("transformers.models.llama.modeling_llama.eager_attention_forward", eager)
    sinks = torch.ones(1, 6, 9, 1)
    with apply(model, Plan.uniform(fingerprint(model), RULE)) as handle:
        logits(model, tokens(1, 9), sinks=sinks)
    assert len(called) == 2
    assert [reason.split(":")[0] for reason in handle.report().unplanned] == ["softcap or sinks"]


def test_attention_to_images_stays_dense_by_name():
    text = SIZES | GQA | {"cross_attention_layers": [1]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
    config = tr.MllamaConfig(text_config=text, vision_config=vision, image_token_index=60)
    torch.manual_seed(0)
    model = tr.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            if hasattr(layer, "cross_attn_attn_gate"):
                layer.cross_attn_attn_gate.fill_(1.0)
    ids, states = tokens(1, 9), torch.randn(1, 12, 24)
    inputs = {"cross_attention_states": states}
    expected = logits(model, ids, **inputs)
    plan = Plan(fingerprint(model), [[dense()] * 6, [Pattern.parse(RULE)] * 6])
    with apply(model, plan, backend="reference") as handle:
        close(logits(model, ids, **inputs), expected)
    assert [reason.split(":")[0] for reason in handle.report().unplanned] == ["layer type cross_attention"]
    with apply(model, Plan(fingerprint(model), plan.patterns[::-1])) as handle:
        close(in_steps(model, ids, handle.cache(12), [6, 1, 2]), logits(model, ids, use_cache=False))


TWO_IN_A_LAYER = {
    "num_layers": 2,
    "num_experts_per_tok": 2,
    "ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 8,
    "zero_expert_num": 1,
}


@pytest.mark.parametrize(
    ("name", "changes"), [("DeepseekV3Config", {}), ("YoutuConfig", {}), ("LongcatFlashConfig", TWO_IN_A_LAYER)]
)
def test_latent_attention_with_narrower_values_follows_the_plan(name, changes):
    model = built(name, **(MHA | EXPERTS | MLA | {"n_group": 1, "topk_group": 1} | changes))
    plan, ids = Plan.uniform(fingerprint(model), RULE), tokens(2, 20)
    with apply(model, plan, backend="portable", strict=True) as handle:
        whole = logits(model, ids, use_cache=False)
        close(in_steps(model, ids, handle.cache(20), [7, 1, 5, 1, 6]), whole)
    close(whole, oracle(model, plan, ids))
