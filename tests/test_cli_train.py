"""attnsieve train on tiny models: from nothing, resumed, converted, and what it refuses."""

import json

import pytest
import torch
import transformers as tr

from attnsieve.nn import DmaForCausalLM
from tests.cli_tiny import attnsieve, save_tiny_model
from tests.nn_text import sentences

SIZES = ["--set", "hidden_size=32", "--set", "intermediate_size=48", "--set", "num_hidden_layers=2"]
QUICK = ["--length", 48, "--batch-size", 4, "--log-every", 2, "--keep", 12, "--lr", 0.01]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(sentences(300))
    return path


def done(*arguments):
    result = attnsieve("train", *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments) -> str:
    result = attnsieve("train", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr


def test_train_resume_load_and_generate(text, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--text", text, *SIZES, *QUICK, "--tokenizer", "bytes", "--steps", 6, "--save-every", 3]
    printed = json.loads(done(*options, "--out", whole, "--json").stdout)
    losses = [row["loss"] for row in printed["log"] if "loss" in row]
    assert losses[-1] < losses[0]
    broken.mkdir()
    for name in ("checkpoint-3", "run.json"):
        (whole / name).rename(broken / name)
    assert "loss" in done(*options, "--out", broken, "--resume").stdout
    models = [tr.AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, broken)]
    assert type(models[0]) is DmaForCausalLM
    assert (models[0].config.keep_window_size, models[0].config.window) == (12, 3)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
    tokenizer = tr.AutoTokenizer.from_pretrained(whole)
    ids = tokenizer("sieve attends", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "sieve attends"
    assert models[0].generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 5
    ran = attnsieve("run", whole, "--prompt", "sieve attends", "--max-new-tokens", 5)
    assert ran.exit_code == 0
    assert "as the model has it" in ran.stderr
    assert "save-every" not in refused(*options, "--out", broken)


@pytest.mark.parametrize("layer", ["mha", "swa", "nsa"])
def test_other_attentions_and_a_learned_tokenizer(layer, text, tmp_path):
    options = ["--tokenizer", "bpe:300", "--bf16", "--layer", layer, "--steps", 2]
    done("--text", text, *SIZES, *QUICK, *options, "--out", tmp_path / "run")
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.attention == layer
    assert model.config.sliding_window == (12 if layer == "swa" else None)
    assert 257 < model.config.vocab_size <= 300


def test_a_converted_model_is_measured_before_and_after(text, tmp_path):
    save_tiny_model(tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<s>"}))
    options = ["--convert", tmp_path / "dense", "--text", text, "--eval-text", text, "--eval-items", 2, "--set", "window=4"]
    fit = ["--length", 256, "--keep", 300, "--steps", 30, "--lr", 0.01, "--batch-size", 2]
    printed = json.loads(done(*options, *fit, "--out", tmp_path / "dma", "--json").stdout)
    measures = printed["measures"]
    assert list(measures) == ["dense", "converted", "trained"]
    assert set(measures["dense"]) == {"nll", "exact_match", "answer_nll"}
    nll = {name: float(found["nll"].split()[0]) for name, found in measures.items()}
    assert nll["converted"] == pytest.approx(nll["dense"], rel=0.02)
    assert nll["trained"] < nll["dense"] - 0.5
    assert tr.AutoModelForCausalLM.from_pretrained(tmp_path / "dma").config.window == 4


def test_configuration_files_replace_the_small_model(text, tmp_path):
    (tmp_path / "model.yaml").write_text("hidden_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\nsinks: 1\n")
    (tmp_path / "model.json").write_text(json.dumps({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}))
    for kind in ("yaml", "json"):
        options = [
            "--config",
            tmp_path / f"model.{kind}",
            "--set",
            "intermediate_size=24",
            "--steps",
            1,
            "--tokenizer",
            "bytes",
        ]
        done("--text", text, *QUICK, *options, "--out", tmp_path / kind)
        config = tr.AutoConfig.from_pretrained(tmp_path / kind)
        assert (config.hidden_size, config.intermediate_size, config.sinks) == (16, 24, kind == "yaml")


def test_training_that_diverges_is_a_sentence_and_leaves_no_model(text, tmp_path):
    options = [*SIZES, *QUICK, "--lr", 1e9, "--tokenizer", "bytes", "--steps", 6]
    message = refused("--text", text, *options, "--out", tmp_path / "run").splitlines()[-1]
    assert message.startswith("attnsieve: training has diverged by step 1: the bias of a key is infinite or NaN")
    assert message.endswith("take a lower learning rate (it was 1e+09) or more warmup")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_bad_input_is_a_sentence(text, tmp_path):
    start = ["--text", text, "--steps", 1, "--out", tmp_path / "run", *QUICK]
    (tmp_path / "list.yaml").write_text("- 1\n")
    for options, word in (
        (["--layer", "linear"], "attention must be one of"),
        (["--set", "hiden_size=3"], "no field 'hiden_size'"),
        (["--set", "hidden_size=many"], "the kind of 1024"),
        (["--set", "vocab_size=10"], "tokens, the model is to have 10"),
        (["--set", "pad_token_id=99999"], "pad_token_id must be one of the"),
        (["--set", "sinks=1", "--set", "sinks=2"], "sinks was given twice"),
        (["--set", "head_dim=none", "--set", "num_key_value_heads=many"], "cannot be configured"),
        (["--tokenizer", tmp_path / "nowhere"], "no tokenizer"),
        (["--tokenizer", "bpe:100"], "at least 257"),
        (["--config", tmp_path / "nowhere.yaml"], "nowhere.yaml"),
        (["--config", tmp_path / "list.yaml"], "names and values"),
        (["--convert", "x", "--layer", "swa"], "leave out --layer"),
        (["--convert", tmp_path / "nowhere"], "nowhere"),
        (["--warmup", 5], "warmup"),
        (["--resume"], "no checkpoint"),
    ):
        message = refused(*start, *options)
        assert message.startswith("attnsieve: ")
        assert word in message
    assert "no text" in refused("--text", tmp_path / "nothing.txt", *start[2:])
