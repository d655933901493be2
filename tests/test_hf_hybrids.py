"""Models with layers that have no attention: artefacts have a row per layer that has, found by the model's own number."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.evaluation import layer_fidelity
from attnsieve.evaluation.scoring import fork, score_documents
from attnsieve.evaluation.tokens import split_answer
from attnsieve.fingerprint import Fingerprint
from attnsieve.fitting import fit, fit_budget
from attnsieve.hf import apply, fingerprint, measure, profile
from attnsieve.patterns import Pattern, dense
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile
from attnsieve.show import mass_grid
from attnsieve.show.report import report_data
from attnsieve.show.summary import plan_summary, profile_summary
from attnsieve.show.views import head_view, typical_heads
from tests.cli_tiny import attnsieve, save_tiny_model
from tests.evaluation_tiny import tokenizer
from tests.hf_tiny import MHA, close, logits, mixed_plan, oracle, tokens
from tests.test_hf_architectures import built, in_steps

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_ngroups": 1, "mamba_d_state": 8}
# By family, all with attention in layers 1 and 3.
HYBRIDS = {
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "Qwen3NextConfig": DELTA | EXPERTS | {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 8},
    "Qwen3_5TextConfig": DELTA | {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 8},
    "JambaConfig": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "GraniteMoeHybridConfig": MAMBA | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    "NemotronHConfig": MAMBA | {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"]},
    "ZambaConfig": ZAMBA | {"n_mamba_heads": 2, "mamba_dt_rank": 4},
    "Zamba2Config": ZAMBA | {"n_mamba_heads": 4},
}
ATTENDING = [1, 3]
# Steps of recurrent states in float32 round more than attention does.
STATES = 5e-4
RULE = "sink(2) | window(4)"


def hybrid(name="Lfm2Config"):
    return built(name, **MHA, num_hidden_layers=4, **HYBRIDS[name])


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_plan_has_a_row_for_every_layer_with_attention(name):
    model, ids = hybrid(name), tokens(2, 20)
    plan = mixed_plan(model)
    assert list(plan.fingerprint.indices) == ATTENDING
    assert len(plan.patterns) == 2
    stock = logits(model, ids, use_cache=False)
    with apply(model, Plan.uniform(plan.fingerprint, "dense()")):
        close(logits(model, ids, use_cache=False), stock)
    with apply(model, plan, backend="reference", strict=True) as handle:
        whole = logits(model, ids, use_cache=False)
        close(in_steps(model, ids, tr.DynamicCache(config=model.config), [13, 1, 1, 1, 1, 1, 1, 1]), whole, STATES)
    assert [layer.layer for layer in handle.report().layers] == ATTENDING
    close(whole, oracle(model, plan, ids))
    assert (whole - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", HYBRIDS)
def test_all_layers_with_attention_are_observed(name):
    model, texts = hybrid(name), [tokens(2, 24, seed=1)]
    found = profile(model, texts, pcl=8, lengths=(20,), progress=False)
    assert found.maps.shape[0] == 2
    assert (found.maps.sum(-1) - 1).abs().max() < 1e-5
    plan = fit(found, preset="robust")
    assert len(plan.patterns) == len(plan.provenance["choice"]) == 2
    measured = measure(model, texts, ["window(4)", "window(8)"], progress=False)
    whole = measured.candidates.index("dense()")
    assert (measured.density[:, whole] == 1).all()
    assert (measured.error[:, :whole].sum(-1) > 0).all()
    with apply(model, plan, strict=True):
        assert logits(model, tokens(1, 24)).isfinite().all()


def test_each_layer_is_observed_in_its_own_row():
    model, ids = hybrid(), tokens(1, 12)
    maps = profile(model, [ids], pcl=12, lengths=(), progress=False).maps
    seen = {}
    for index in ATTENDING:
        module = model.model.layers[index].self_attn
        module.register_forward_hook(lambda module, _, out, index=index: seen.__setitem__(index, out[1]))
    with torch.no_grad():
        model(ids)
    for row, index in enumerate(ATTENDING):
        close(maps[row], seen[index][0])


def test_budgets_count_layers_with_attention_alone():
    model = hybrid()
    measured = measure(model, [tokens(2, 32)], ["window(2)", "window(8)"], progress=False)
    plan = fit_budget(measured, density=0.4)
    kept = layer_fidelity(model, plan, tokens(32).tolist()).density
    assert kept.shape == (2, 4)
    assert kept.mean() <= 0.4 + 1e-6
    assert plan.provenance["expected"]["density"] == pytest.approx(float(plan.density.mean()), rel=1e-4)


def test_a_measurement_that_counts_layers_without_attention_is_refused():
    model = hybrid()
    measured = measure(model, [tokens(1, 16)], [RULE], progress=False)
    tables = {
        name: torch.cat([0 * getattr(measured, name), getattr(measured, name)], 2) for name in ("density", "retained", "error")
    }
    with pytest.raises(UserError, match=r"no candidate keeps anything in layers \[0, 1\]"):
        replace(measured, fingerprint=Fingerprint("lfm2", 4, 4, 4, 6, "0" * 16), **tables)


def test_an_old_plan_with_rows_for_all_layers_still_applies():
    model, ids = hybrid(), tokens(1, 12)
    mark = fingerprint(model)
    data = {name: value for name, value in mark.to_json().items() if name != "indices"} | {"layers": 4}
    rows = [[Pattern.parse("window(1)")] * 4, [Pattern.parse(RULE)] * 4] * 2
    old = Plan(Fingerprint.from_json(data), rows)
    with apply(model, Plan.uniform(mark, RULE), strict=True):
        expected = logits(model, ids)
    with apply(model, old, strict=True):
        close(logits(model, ids), expected)
    fidelity = layer_fidelity(model, old, ids[0].tolist())
    close(fidelity.error, layer_fidelity(model, Plan.uniform(mark, RULE), ids[0].tolist()).error)
    other = Fingerprint.from_json(data | {"config_hash": "0" * 16})
    with pytest.raises(UserError, match="config_hash"):
        apply(model, Plan(other, rows))


def test_layers_without_attention_have_no_row():
    plan = Plan.uniform(fingerprint(hybrid()), RULE)
    for layer in (0, 2, 4, -1):
        with pytest.raises(UserError, match=f"no attention in layer {layer}; it has in layers 1, 3"):
            plan.row(layer)


def test_a_plan_for_other_layers_is_refused():
    plan = Plan.uniform(fingerprint(hybrid()), RULE)
    changed = built("Lfm2Config", **MHA, num_hidden_layers=4, layer_types=["full_attention", "conv", "conv", "full_attention"])
    with pytest.raises(UserError, match="layers with attention: made for 1, 3, the model has 0, 3"):
        apply(changed, plan)
    with pytest.raises(UserError, match="layers with attention: made for 1, 3, the model has 0 to 3") as raised:
        apply(built("Lfm2Config", **MHA, num_hidden_layers=4, layer_types=["full_attention"] * 4), plan)
    assert "layers: made for 2" not in str(raised.value), "both models have four"


def test_a_plan_with_rows_for_layers_without_attention_is_told_which_have():
    mark = fingerprint(hybrid())
    with pytest.raises(
        UserError, match=r"needs 2 rows of 4 patterns, one for each layer with attention \(layers 1, 3\), got 4"
    ):
        Plan(mark, [[dense()] * 4] * 4)


NO_ATTENTION = {
    "Lfm2Config": {"layer_types": ["conv"] * 4},
    "Qwen3NextConfig": DELTA | EXPERTS | {"layer_types": ["linear_attention"] * 4, "head_dim": 8},
    "JambaConfig": EXPERTS | {"attn_layer_period": 9, "attn_layer_offset": 8, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "MambaConfig": {"state_size": 8},
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_models_without_any_attention_are_told_so(name):
    model = built(name, **({} if name == "MambaConfig" else MHA), num_hidden_layers=4, **NO_ATTENTION[name])
    plan = Plan.uniform(fingerprint(hybrid()), RULE)
    for run in (
        lambda: fingerprint(model),
        lambda: apply(model, plan),
        lambda: profile(model, [tokens(1, 20)], pcl=8, lengths=(), progress=False),
        lambda: measure(model, [tokens(1, 20)], [RULE], progress=False),
    ):
        with pytest.raises(UserError, match=r"has no layers with attention \(its layers: [\w ]+\), so .*: use a model"):
            run()


def test_a_ragged_cache_beside_convolutions(tmp_path):
    model, ids = hybrid(), tokens(2, 20)
    plan = Plan.uniform(fingerprint(model), RULE)
    with apply(model, plan, backend="portable", strict=True) as handle:
        cache = handle.cache(20)
        close(in_steps(model, ids, cache, [13, 1, 1, 1, 1, 1, 1, 1]), logits(model, ids, use_cache=False))
        report = cache.report()
        assert [layer.layer for layer in report.layers] == ATTENDING
        assert report.share == pytest.approx(6 / 20)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(ids, past_key_values=handle.cache(30), **options), model.generate(ids, **options))


def test_what_is_saved_names_the_layers(tmp_path):
    model, texts = hybrid(), [tokens(1, 24)]
    for number, made in enumerate(
        [
            Plan.uniform(fingerprint(model), RULE),
            profile(model, texts, pcl=8, lengths=(), progress=False),
            measure(model, texts, [RULE], progress=False),
        ]
    ):
        made.save_pretrained(tmp_path / str(number))
        loaded = type(made).from_pretrained(tmp_path / str(number))
        assert loaded.fingerprint == made.fingerprint
        assert list(loaded.fingerprint.indices) == ATTENDING
        assert isinstance(loaded, Plan | Profile | Measurement)


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [1], [-1, 3], [1.0, 3], [1, "3"], [], "13", None])
def test_indices_are_read_strictly(indices):
    data = fingerprint(hybrid()).to_json() | {"indices": indices}
    with pytest.raises(UserError, match=r"indices .*: make the artefact of this model again"):
        Fingerprint.from_json(data)


def test_models_whose_layers_all_have_attention_are_written_as_before():
    mark = Fingerprint("toy", 3, 2, 1, 8, "0" * 16)
    assert "indices" not in mark.to_json()
    assert Fingerprint("toy", 3, 2, 1, 8, "0" * 16, [0, 1, 2]) == mark == Fingerprint.from_json(mark.to_json())
    assert hash(mark) == hash(Fingerprint.from_json(mark.to_json()))


def test_figures_and_tables_call_layers_by_the_models_numbers(tmp_path):
    model = hybrid()
    found = profile(model, [tokens(2, 24)], pcl=8, lengths=(), progress=False)
    plan = Plan(fingerprint(model), [[dense()] * 4, [Pattern.parse(RULE)] * 4])
    assert [layer["layer"] for layer in plan_summary(plan)["layers"]] == ATTENDING
    assert [layer["layer"] for layer in profile_summary(found)["layers"]] == ATTENDING
    assert {layer for layer, _ in typical_heads(plan)} == {3}
    view = head_view(3, 2, profile=found, plan=plan)
    assert view.name.startswith("layer 3, head 2")
    assert torch.equal(view.mean, found.maps[1, 2])
    with pytest.raises(UserError, match="no layer 0, head 1: the model has layers 1, 3 of heads 0 to 3"):
        head_view(0, 1, profile=found)
    labels = [
        text.get_text() for text in mass_grid(torch.rand(2, 4), layers=plan.fingerprint.indices).axes[0].get_yticklabels()
    ]
    assert labels == ["1", "3"]
    content = report_data(plan, found, None, [(3, 2)])
    assert content["numbers"] == ATTENDING
    assert content["first"] == "1:2"


def test_all_commands_serve_hybrids(tmp_path):
    model, text = save_tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 260, "num_hidden_layers": 4}
    special = {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 512}
    tr.Lfm2ForCausalLM(tr.Lfm2Config(**sizes, **MHA, **special, **HYBRIDS["Lfm2Config"])).save_pretrained(model)
    text.write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)
    source = ["--data", text, "--documents", 3, "--lengths", 128]
    two, rows = ["--items", 2], ["--out", tmp_path / "rows.jsonl"]
    commands = [
        ["profile", model, *source, "--pcl", 16, "--out", tmp_path / "profile"],
        ["fit", tmp_path / "profile", "--preset", "adaptive", "--dense-layers", 1, "--out", tmp_path / "plan"],
        ["measure", model, *source, "--candidates", RULE, "--out", tmp_path / "measured"],
        ["fit", tmp_path / "measured", "--density", 0.6, "--dense-layers", 1, "--out", tmp_path / "budget"],
        ["show", tmp_path / "plan", tmp_path / "profile", "--heads", "3:1", "--out", tmp_path / "figures"],
        ["show", tmp_path / "budget", "--html", tmp_path / "report.html", "--heads", "3:1"],
        ["run", model, "--plan", tmp_path / "budget", "--prompt", "hello", "--max-new-tokens", 5],
        ["eval", model, "--tasks", "kv,fidelity", "--plan", tmp_path / "budget", "--text", text, "--lengths", 128, *two, *rows],
    ]
    for command in commands:
        done = attnsieve(*command)
        assert done.exit_code == 0, (command[0], done.output)
    assert [rule == dense() for row in Plan.from_pretrained(tmp_path / "budget").patterns for rule in row] == [True] * 4 + [
        False
    ] * 4
    refused = attnsieve("show", tmp_path / "budget", "--html", tmp_path / "report.html", "--heads", "0:1")
    assert refused.exit_code == 2
    assert "no layer 0" in refused.output


@pytest.mark.parametrize("name", ["Lfm2Config", "ZambaConfig"])
def test_questions_over_shared_documents_take_recurrent_states_along(name):
    model, ids = hybrid(name), tokens(2, 16)
    expected = logits(model, ids, use_cache=False)[[1, 0, 1], 12:]
    cache = tr.DynamicCache(config=model.config)
    logits(model, ids[:, :12], past_key_values=cache)
    forked = fork(cache, [1, 0, 1])
    close(in_steps(model, ids[[1, 0, 1], 12:], forked, 1), expected, STATES)


@pytest.mark.parametrize("name", ["Lfm2Config", "Qwen3NextConfig", "JambaConfig", "ZambaConfig", "MiniMaxConfig"])
def test_questions_over_shared_documents_score_as_if_asked_alone(name):
    """Jamba and Zamba forget their states when several tokens follow at once; MiniMax has them outside the layers of its cache."""
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 2}
    changes = HYBRIDS.get(name, kinds) | {"vocab_size": len(tokenizer())}
    model = built(name, **MHA, num_hidden_layers=4, **changes)
    document = "".join(f"key{n}: {n * 1237 % 1000}\n" for n in range(6))
    questions = [(f"{document}what is key{n}: ", str(n * 1237 % 1000)) for n in (1, 3, 5)]
    (together,) = score_documents(model, tokenizer(), [questions])
    for question, score in zip(questions, together, strict=True):
        ((alone,),) = score_documents(model, tokenizer(), [[question]])
        assert score.nll == pytest.approx(alone.nll, abs=STATES)


def recurrent_gemma():
    wide = {"hidden_size": 32, "lru_width": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    kinds = {"num_hidden_layers": 3, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]}
    return built("RecurrentGemmaConfig", **(wide | kinds), vocab_size=len(tokenizer()))


@pytest.mark.parametrize("plan", [False, True])
def test_answers_of_a_model_that_returns_no_cache_are_scored(plan):
    """RecurrentGemma fills the cache that it is given, and keeps its states in its modules."""
    model, tokens = recurrent_gemma(), tokenizer()
    document = "".join(f"key{n}: {n * 1237 % 1000}\n" for n in range(3))
    questions = [(f"{document}what is key{n}: ", str(n * 1237 % 1000)) for n in (1, 2)]
    with apply(model, Plan.uniform(fingerprint(model), RULE)) if plan else nullcontext():
        (scores,) = score_documents(model, tokens, [questions])
        (single,) = score_documents(model, tokens, [[("k", "12")]])
        for (prompt, answer), score in zip([*questions, ("k", "12")], [*scores, *single], strict=True):
            start, rest = split_answer(tokens, prompt, answer)
            whole = logits(model, torch.tensor([start + rest]), use_cache=False)[0, len(start) - 1 : -1].log_softmax(-1)
            assert score.nll == pytest.approx(-float(whole[torch.arange(len(rest)), rest].mean()), abs=STATES)


def test_models_that_fill_no_cache_of_keys_are_told_which_tasks_they_can_do():
    model = built("MambaConfig", state_size=8, num_hidden_layers=1, vocab_size=len(tokenizer()))
    with pytest.raises(UserError, match=r"MambaForCausalLM fills no cache of keys .*: use tasks without answers"):
        list(score_documents(model, tokenizer(), [[("key: ", "12")]]))
