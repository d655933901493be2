"""apply attaches to one model, says what it did, honours or names what it cannot follow, and leaves no trace."""

import copy
import json

import pytest
import torch
import transformers as tr
from torch import nn

import attnsieve
from attnsieve import UserError
from attnsieve.hf import apply, fingerprint
from attnsieve.hf.geometry import attention_layers
from attnsieve.plan import Plan
from tests.hf_tiny import FAMILIES, GQA, SIZES, close, logits, mixed_plan, oracle, tiny, tokens


def built(config, dtype=torch.float32):
    torch.manual_seed(0)
    return tr.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)


def sparse(model, text="sink(1) | window(4)"):
    return Plan.uniform(fingerprint(model), text)


def traces(model):
    """Everything of a model that an adapter could leave changed."""
    attributes = [
        (
            name,
            sorted(module.__dict__),
            [dict(vars(module).get(hooks, {})) for hooks in ("_forward_hooks", "_forward_pre_hooks")],
        )
        for name, module in model.named_modules()
    ]
    methods = [type(module).forward for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return attributes, methods, model.config.to_dict(), model.config._attn_implementation, weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_removal_restores_bit_for_bit(family, implementation):
    model = tiny(family)
    model.set_attn_implementation(implementation)
    ids = tokens(2, 23)
    before, expected = traces(model), logits(model, ids)
    with apply(model, mixed_plan(model), backend="reference"):
        assert not torch.equal(logits(model, ids), expected)
    after = traces(model)
    assert after[:4] == before[:4]
    assert all(torch.equal(after[4][name], tensor) for name, tensor in before[4].items())
    assert torch.equal(logits(model, ids), expected)


def test_an_error_inside_the_block_still_restores():
    model = tiny()
    with pytest.raises(RuntimeError, match="mine"), apply(model, sparse(model)):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.model.layers[0].self_attn, "_attnsieve")


def test_a_handle_works_without_a_block_and_keeps_its_report():
    model = tiny()
    handle = apply(model, sparse(model), backend="reference")
    logits(model, tokens(1, 9))
    handle.remove()
    handle.remove()
    assert handle.report().sparse_calls == 2
    logits(model, tokens(1, 9))
    assert handle.report().sparse_calls == 2


def test_the_package_offers_apply_and_profile():
    assert attnsieve.apply is apply
    assert attnsieve.profile is attnsieve.hf.profile


def test_two_models_at_once_do_not_meet():
    first, second, third = tiny("llama"), tiny("qwen3"), tiny("llama")
    ids = tokens(1, 21)
    plain = logits(third, ids)
    plans = mixed_plan(first), sparse(second)
    expected = oracle(first, plans[0], ids), oracle(second, plans[1], ids)
    with apply(first, plans[0], backend="reference") as a, apply(second, plans[1], backend="reference") as b:
        close(logits(first, ids), expected[0])
        close(logits(second, ids), expected[1])
        assert torch.equal(logits(third, ids), plain)
    assert a.report().sparse_calls == b.report().sparse_calls == 2


def test_a_second_plan_on_the_same_model_is_refused():
    model = tiny()
    ids = tokens(1, 12)
    with apply(model, mixed_plan(model), backend="reference") as handle:
        expected = logits(model, ids)
        for inner in (model, model.model):
            with pytest.raises(UserError, match="already active"):
                apply(inner, sparse(model))
        assert torch.equal(logits(model, ids), expected)
    assert handle.report().sparse_calls == 4
    assert model.config._attn_implementation == "eager"


def test_the_inner_model_can_be_given_too():
    model = tiny()
    plan = mixed_plan(model)
    ids = tokens(1, 14)
    with apply(model.model, plan, backend="reference"):
        got = logits(model, ids)
    close(got, oracle(model, plan, ids))


def test_the_name_without_a_plan_is_refused():
    model, other = tiny(), tiny()
    with apply(other, sparse(other)):
        model.set_attn_implementation("attnsieve")
        with pytest.raises(UserError, match="has no plan"):
            logits(model, tokens(1, 5))


@pytest.mark.parametrize("strict", [False, True])
def test_no_pass_runs_dense_because_the_implementation_was_set_under_a_plan(strict):
    model, ids = tiny(), tokens(1, 9)
    with apply(model, sparse(model), strict=strict) as handle:
        expected = logits(model, ids)
        for setting in (model.set_attn_implementation, model.model.set_attn_implementation):
            setting("sdpa")
            with pytest.raises(UserError, match=r'was set to "sdpa" while .* is active.* call remove\(\) on the handle first'):
                logits(model, ids)
            model.set_attn_implementation("attnsieve")
            assert torch.equal(logits(model, ids), expected)
    model.set_attn_implementation("sdpa")
    assert not torch.equal(logits(model, ids), expected)
    assert handle.report().sparse_calls == 2 * 3


def gradients(model, checkpointed, removed_first):
    """Of a sparse pass's loss by the embeddings."""
    ids = tokens(1, 24)
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with apply(model, sparse(model), backend="portable") as handle:
        loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        if removed_first:
            handle.remove()
        loss.backward()
    return embeddings.grad


def test_checkpointed_layers_are_computed_again_under_the_plan_or_not_at_all():
    expected = gradients(tiny(), False, True)
    assert torch.equal(gradients(tiny(), True, False), expected)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(tiny(), True, True)


def test_a_layer_called_by_itself_does_not_run_dense_either():
    model = tiny()
    with apply(model, sparse(model)):
        model.config._attn_implementation = "eager"
        with pytest.raises(UserError, match='was set to "eager"'):
            model.model.layers[1].self_attn(torch.zeros(1, 3, 24), position_embeddings=None)


def test_a_model_of_the_same_configuration_object_cannot_switch_a_plan_off():
    model = tiny()
    with apply(model, sparse(model)):
        tr.LlamaForCausalLM(model.config).set_attn_implementation("sdpa")
        with pytest.raises(UserError, match="another model of the same configuration object"):
            logits(model, tokens(1, 5))


def test_a_checkpoint_saved_under_a_plan_names_no_attention(tmp_path):
    model = tiny()
    with apply(model, sparse(model)):
        model.save_pretrained(tmp_path)
    assert "attnsieve" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, "layers: made for 2, the model has 3"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}, "heads: made for 6, the model has 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "config_hash"),
    ],
)
def test_a_plan_for_another_model_is_refused(changes, named):
    plan = sparse(tiny())
    model = tiny(**changes)
    with pytest.raises(UserError, match=named):
        apply(model, plan)
    assert model.config._attn_implementation == "eager"


def test_a_fingerprint_ignores_what_attention_does_not_see():
    a, b = tiny(), tiny(dtype=torch.bfloat16, vocab_size=77, intermediate_size=40)
    b.config._name_or_path = "elsewhere"
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a) == fingerprint(a.model)


@pytest.mark.parametrize(
    "config",
    [
        tr.FalconConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4),
        tr.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4),
        tr.MptConfig(vocab_size=61, d_model=24, n_layers=2, n_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_the_attention_interface_are_refused(config):
    with pytest.raises(UserError, match="does not use transformers' AttentionInterface"):
        fingerprint(tr.AutoModelForCausalLM.from_config(config))


def test_other_things_are_refused():
    model = tiny()
    plan = sparse(model)
    with pytest.raises(UserError, match="expected a transformers model, got Linear"):
        apply(nn.Linear(2, 2), plan)
    with pytest.raises(UserError, match=r"takes a Plan, got 'window\(3\)'"):
        apply(model, "window(3)")
    with pytest.raises(UserError, match="unknown backend 'cuda'; choose from auto, reference"):
        apply(model, plan, backend="cuda")
    encoder = tr.BertModel(tr.BertConfig(**(SIZES | {"pad_token_id": 0}), num_attention_heads=4))
    with pytest.raises(UserError, match="not a causal decoder"):
        fingerprint(encoder)


def test_attention_weights_cannot_be_had():
    model = tiny()
    with apply(model, sparse(model), backend="reference"), pytest.raises(UserError, match="output_attentions"):
        logits(model, tokens(1, 5), output_attentions=True)


def test_paged_caches_are_refused():
    model = tiny()
    with apply(model, sparse(model), backend="reference"), pytest.raises(UserError, match="continuous batching"):
        logits(model, tokens(1, 5), block_table=torch.zeros(1))


@pytest.mark.parametrize(
    "extra", [{"is_causal": False}, {"position_bias": torch.linspace(-1, 1, 9)}], ids=["bidirectional", "position bias"]
)
def test_calls_that_ask_for_other_attention_stay_dense_by_name(extra, request):
    model = tiny()
    model.set_attn_implementation("sdpa")
    ids = tokens(1, 9)
    expected = logits(model, ids, **extra)
    with apply(model, sparse(model), backend="reference") as handle:
        close(logits(model, ids, **extra), expected)
    assert [reason.split(":")[0] for reason in handle.report().unplanned] == [request.node.callspec.id]


def test_heads_split_over_devices_are_refused():
    model = tiny()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight[:8])
    with apply(model, sparse(model), backend="reference"), pytest.raises(UserError, match="tensor parallelism"):
        logits(model, tokens(1, 5))


def test_the_report_counts_every_call():
    model = tiny()
    plan = Plan(fingerprint(model), [sparse(model).row(0), sparse(model, "dense()").row(1)])
    with apply(model, plan, backend="reference") as handle:
        model.generate(tokens(1, 7), max_new_tokens=5, do_sample=False)
    report = handle.report()
    assert report.layers[0].sparse == {"prefill": 1, "decode": 4}
    assert report.layers[0].dense == {}
    assert report.layers[1].sparse == {}
    assert [reason[:7] for reason in report.layers[1].dense] == ["by plan"]
    assert report.layers[1].dense.total() == 5
    assert (report.sparse_calls, report.unplanned) == (5, {})
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["sparse"] == {"prefill": 1, "decode": 4}
    assert "1 prefill, 4 decode" in str(report)
    assert "dense in layers [1]: by plan" in str(report)


def gemma2():
    return built(tr.Gemma2Config(**SIZES, **GQA, head_dim=4, sliding_window=8, attn_logit_softcapping=2.0))


def gpt_oss():
    config = tr.GptOssConfig(**SIZES, **GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    model = built(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    return model


def llama4():
    return built(
        tr.Llama4TextConfig(**SIZES, **GQA, head_dim=4, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=8)
    )


@pytest.mark.parametrize(("make", "named"), [(gemma2, "softcap"), (gpt_oss, "sinks"), (llama4, "chunked_attention")])
def test_layers_with_their_own_softmax_or_mask_stay_exactly_dense_by_name(make, named):
    model = make()
    ids = tokens(2, 13)
    expected = logits(model, ids)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    with apply(model, sparse(model), backend="reference") as handle:
        close(logits(model, ids), expected)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)
    assert any(named in reason for reason in handle.report().layers[0].dense)
    with pytest.raises(UserError, match=f"strict: the plan makes layer 0 sparse.*{named}"):
        apply(model, sparse(model), strict=True)
    assert apply(model, sparse(model, "dense()"), strict=True).remove() is None


def test_dropout_stays_dense_by_name(caplog):
    model = tiny(attention_dropout=0.5).train()
    ids = tokens(1, 9)
    with apply(model, sparse(model), backend="reference") as handle:
        logits(model, ids)
        logits(model, ids)
    assert [reason[:7] for reason in handle.report().unplanned] == ["dropout"]
    assert len([record for record in caplog.records if "dropout" in record.message]) == 2, "one warning per layer"
    with apply(model, sparse(model), strict=True), pytest.raises(UserError, match=r"strict.*dropout"):
        logits(model, ids)
    model.eval()
    with apply(model, sparse(model), backend="reference", strict=True):
        logits(model, ids)


@pytest.mark.parametrize("rule", ["random_blocks(1, block=4) | window(1)", "top_blocks(1, block=4) | window(1)"])
def test_rules_that_cannot_be_cut_to_a_sliding_window_stay_dense_by_name(rule):
    model = tiny("mistral", sliding_window=8)
    plan = Plan.uniform(fingerprint(model), rule)
    for ids in (tokens(1, 5), tokens(1, 20)):
        model.set_attn_implementation("sdpa")
        expected = logits(model, ids)
        with apply(model, plan, backend="reference") as handle:
            assert torch.equal(logits(model, ids), expected)
        assert [reason[:14] for reason in handle.report().unplanned] == ["sliding window"]
    with pytest.raises(UserError, match=r"strict.*sliding window.*_blocks\(1.* cannot be cut to"):
        apply(model, plan, strict=True)


def test_a_window_beyond_the_context_does_not_bind_and_must_not():
    model = tiny("mistral", sliding_window=16, max_position_embeddings=16)
    plan = sparse(model)
    ids = tokens(1, 15)
    expected = logits(model, ids)
    with apply(model, plan, backend="reference", strict=True):
        assert (logits(model, ids) - expected).abs().max() > 1e-3
        with pytest.raises(UserError, match="beyond the model's context of 16"):
            logits(model, tokens(1, 17))
        # A whole text of as many tokens has lost no key; of a step the cache may have dropped one.
        cache = tr.DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        with pytest.raises(UserError, match="beyond the model's context of 16"):
            logits(model, tokens(1, 1), past_key_values=cache)


def own_masks(n):
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    yield "gaps", (causal & (torch.arange(n) != 2))[None, None]
    yield "several sequences", (causal & ~causal.tril(-4))[None, None]
    yield "caller's own mask", causal.expand(1, 6, n, n)
    yield "caller's own mask", torch.zeros(1, 1, n, n).masked_fill(~causal, lowest)


@pytest.mark.parametrize(("named", "mask"), list(own_masks(9)))
def test_masks_of_the_caller_stay_dense_by_name(named, mask):
    model = tiny()
    model.set_attn_implementation("sdpa")
    ids = tokens(1, 9)
    expected = logits(model, ids, attention_mask=mask)
    with apply(model, sparse(model), backend="reference") as handle:
        close(logits(model, ids, attention_mask=mask), expected)
    assert handle.report().sparse_calls == 0
    assert [reason for reason in handle.report().unplanned if named in reason]
    with apply(model, sparse(model), strict=True), pytest.raises(UserError, match=f"strict.*{named}"):
        logits(model, ids, attention_mask=mask)


def test_a_mask_of_the_models_own_is_named_once_however_many_steps_there_are(caplog):
    model, ids = built(tr.DogeConfig(**SIZES, **GQA)), tokens(1, 5)
    with apply(model, sparse(model)) as handle:
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert [*handle.report().unplanned.values()] == [2 * 6]
    assert len(caplog.records) == 2


def test_a_causal_mask_of_the_caller_is_followed():
    model = tiny()
    plan = mixed_plan(model)
    ids = tokens(1, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    with apply(model, plan, backend="reference", strict=True):
        got = logits(model, ids, attention_mask=mask)
    close(got, oracle(model, plan, ids))


def test_a_mask_changed_between_passes_is_read_again():
    model = tiny()
    ids = tokens(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with apply(model, mixed_plan(model), backend="reference", strict=True):
        logits(model, ids, attention_mask=mask)
        mask[..., 5:, :5] = False
        got = logits(model, ids, attention_mask=mask)
        tail = logits(model, ids[:, 5:], position_ids=torch.arange(5, 12)[None])
    close(got[:, 5:], tail)


def test_rows_that_keep_nothing_output_zero_and_stay_finite():
    model = tiny()
    plan = sparse(model, "diagonals(3)")
    ids = tokens(1, 10)
    model.set_attn_implementation("sdpa")
    expected = oracle(model, plan, ids, "sdpa")
    with apply(model, plan, backend="reference"):
        got = logits(model, ids)
    assert got.isfinite().all()
    close(got, expected)


def test_vision_towers_keep_their_own_attention():
    text = tr.Gemma3TextConfig(**SIZES, **GQA, head_dim=4, layer_types=["full_attention"] * 2).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = tr.Gemma3ForConditionalGeneration(tr.Gemma3Config(text_config=text, vision_config=vision)).eval()
    before = model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation
    with apply(model, sparse(model), backend="reference", strict=True) as handle:
        assert model.config.vision_config._attn_implementation == before[0] != "attnsieve"
        logits(model, tokens(1, 9))
    assert handle.report().sparse_calls == 2
    assert (model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation) == before


def test_a_copied_layer_list_is_in_layer_order():
    model = tiny()
    model.model.layers = nn.ModuleList([model.model.layers[1], model.model.layers[0]])
    assert [layer.index for layer in attention_layers(model)] == [0, 1]
    twice = copy.deepcopy(model)
    twice.model.layers[0].self_attn.layer_idx = 0
    with pytest.raises(UserError, match="several attention modules in one layer"):
        attention_layers(twice)
