"""Training: the loss falls, runs resume exactly, processes share a run, bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tr

from attnsieve import UserError
from attnsieve.nn import DmaConfig, DmaForCausalLM
from attnsieve.nn.corpus import TokenBlocks, open_text
from attnsieve.nn.monitor import SelectionMonitor, selection_statistics
from attnsieve.nn.selection import SelectionRule
from attnsieve.nn.training import TrainingSettings, train
from tests.nn_text import SYMBOLS, characters, sentences
from tests.nn_tiny import SIZES, distinct_tokens, dma
from tests.two_processes import report_of


def fresh(**changes) -> DmaForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(SYMBOLS), "keep_window_size": 12, "initial_A": 0.1, "eos_token_id": 0}
    return DmaForCausalLM(DmaConfig(**{**sizes, **changes}))


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"steps": 6, "length": 48, "batch_size": 4, "log_every": 2, "progress": False, **changes})


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(200))
    return path


def test_the_loss_falls_and_everything_is_logged_and_saved(text, tmp_path):
    out = tmp_path / "run"
    log = train(fresh(), characters(), text, out, settings(steps=30, log_every=10, learning_rate=1e-2))
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 3
    assert losses[-1] < 0.7 * losses[0]
    row = [row for row in log if "loss" in row][-1]
    assert {"selection/admitted", "selection/own_token", "selection/distance", "A/mean", "A/min", "A/max"} <= set(row)
    assert 12 / 48 < row["selection/admitted"] < 1
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == log
    assert (out / "model.safetensors").exists()
    assert not (out / "training_args.bin").exists()
    loaded = tr.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.model.layers[0].self_attn.A[0] != 0.1
    assert tr.AutoTokenizer.from_pretrained(out)("to the").input_ids == characters()("to the").input_ids


def test_a_resumed_run_ends_as_an_unbroken_one(text, tmp_path):
    whole = fresh()
    log = train(whole, characters(), text, tmp_path / "whole", settings(save_every=3))
    out = tmp_path / "broken"
    out.mkdir()
    for name in ("checkpoint-3", "run.json"):
        (tmp_path / "whole" / name).rename(out / name)
    for changes, word in (({"length": 40}, "length 40"), ({"steps": 7}, "steps 7")):
        with pytest.raises(UserError, match=word):
            train(fresh(), characters(), text, out, settings(save_every=3, **changes), resume=True)
    with pytest.raises(UserError, match="keep_window_size 11"):
        train(fresh(keep_window_size=11), characters(), text, out, settings(save_every=3), resume=True)
    with pytest.raises(UserError, match="cannot resume with text"):
        train(fresh(), characters(), [sentences(199)], out, settings(save_every=3), resume=True)
    resumed = fresh()
    again = train(resumed, characters(), text, out, settings(save_every=3), resume=True)
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    assert next(row["loss"] for row in again if row["step"] == 6) == next(row["loss"] for row in log if row["step"] == 6)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (2, 3), (5, 2)])
def test_a_text_is_read_again_within_a_batch_and_a_step(batch_size, accumulation, tmp_path):
    """A text of three blocks trains as if it stood there many times, and a run that is resumed beyond its end goes on there."""
    story = sentences(40)[: 3 * 48 - 1]
    chosen = settings(steps=4, batch_size=batch_size, accumulation=accumulation, save_every=3)
    models = {name: fresh() for name in ("short", "long", "resumed")}
    train(models["short"], characters(), [story], tmp_path / "short", chosen)
    train(models["long"], characters(), [story] * 20, tmp_path / "long", chosen)
    (tmp_path / "resumed").mkdir()
    for name in ("checkpoint-3", "run.json"):
        (tmp_path / "short" / name).rename(tmp_path / "resumed" / name)
    train(models["resumed"], characters(), [story], tmp_path / "resumed", chosen, resume=True)
    weights = [model.state_dict().values() for model in models.values()]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True))


def test_documents_that_can_be_read_once_only_are_refused(tmp_path):
    with pytest.raises(UserError, match="documents are read several times"):
        train(fresh(), characters(), (story for story in [sentences(40)]), tmp_path, settings())


def test_a_finished_run_stays_as_it_is_when_it_is_resumed(text, tmp_path):
    whole, again = fresh(), fresh()
    log = train(whole, characters(), text, tmp_path, settings())
    (tmp_path / "model.safetensors").unlink()  # as where a run ends between its last checkpoint and the model
    assert train(again, characters(), text, tmp_path, settings(), resume=True) == [
        row for row in log if "train_runtime" not in row
    ]
    for model in (again, DmaForCausalLM.from_pretrained(tmp_path)):
        assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("attention", ["dma", "mla", "nsa"])
def test_bfloat16_with_checkpointing_and_accumulation(attention, text, tmp_path):
    options = {"num_key_value_heads": None} if attention == "mla" else {}
    model = fresh(attention=attention, nsa_block=4, nsa_stride=2, nsa_selected_block=8, **options)
    chosen = settings(precision="bfloat16", checkpointing=True, accumulation=2, steps=4)
    log = train(model, characters(), text, tmp_path / "run", chosen)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in log if "loss" in row)
    assert next(model.parameters()).dtype == torch.float32
    assert ("A/mean" in log[0]) == (attention == "dma")


@pytest.mark.parametrize(("log_every", "told"), [(1, "step 2: grad_norm is nan"), (100, "step 3: .* holds NaN")])
def test_training_that_diverges_ends_and_saves_nothing_of_it(log_every, told, text, tmp_path):
    model = fresh(attention="gqa")  # DMA's scores are looked at in every step, on a CPU
    passes = []

    def spoil(grad):
        passes.append(grad)
        return grad * torch.nan if len(passes) == 2 else grad

    model.lm_head.weight.register_hook(spoil)
    with pytest.raises(UserError, match=told) as error:
        train(model, characters(), text, tmp_path, settings(log_every=log_every, save_every=3))
    assert "lower learning rate" in str(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, {"exponential_bias": False}])
def test_dma_that_diverges_is_told_as_training_that_did(changes, text, tmp_path):
    wild = settings(learning_rate=1e9, log_every=100, save_every=100)
    with pytest.raises(UserError, match=r"^training has diverged by step \d: .* \(it was 1e\+09\) or more warmup$") as error:
        train(fresh(**changes), characters(), text, tmp_path, wild)
    assert error.value.__cause__.found in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path != text] == ["run.json"]


def test_a_model_that_is_not_finite_before_training_is_told_as_such(text, tmp_path):
    model = fresh()
    model.model.layers[1].self_attn.A.data.fill_(1e9)
    with pytest.raises(UserError, match=r"^the bias of a key is infinite or NaN: .*; check the values, dt weights and A"):
        train(model, characters(), text, tmp_path, settings())


def test_weight_decay_spares_vectors(text, tmp_path):
    model = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight" or "input_residual" in name)
        if "input_residual" in name:
            parameter.register_hook(torch.zeros_like)
    train(model, characters(), text, tmp_path / "run", settings(learning_rate=0.1))
    after = dict(model.named_parameters())
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["model.layers.0.input_residual"], before["model.layers.0.input_residual"])


def test_statistics_of_a_window_and_of_rising_scores():
    flat, rising = torch.zeros(1, 1, 100), torch.arange(100.0)[None, None]
    for sigma in (flat, rising):
        numbers = selection_statistics(sigma, SelectionRule(10))
        assert float(numbers["admitted"]) == float(numbers["own_token"]) == 1.0
        assert float(numbers["distance"]) == pytest.approx(4.5, abs=0.3)
    falling = selection_statistics(-rising, SelectionRule(10, window=1))
    assert float(falling["admitted"]) == pytest.approx(0.1)
    assert float(falling["own_token"]) == 1.0
    assert float(falling["distance"]) > 30


def test_the_monitor_watches_when_active_and_leaves_no_hook():
    model = dma()
    with SelectionMonitor(model) as monitor:
        model(distinct_tokens(1, 20))
        assert monitor.take() == {}
        monitor.active = True
        model(distinct_tokens(1, 20))
        assert monitor.take()["A/max"] == pytest.approx(0.6)
        assert monitor.take() == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_hold_the_text_and_its_ends(tmp_path):
    (tmp_path / "b.txt").write_text("to\nthe last")
    (tmp_path / "a.jsonl").write_text('{"text": "sieve"}\n{"text": "token"}\n')
    (tmp_path / "c.bin").write_text("no text")
    tokenizer = characters()
    blocks = list(TokenBlocks(open_text(tmp_path), tokenizer, 6))
    read = "".join(tokenizer.decode(block["input_ids"]).replace(" ", "") for block in blocks)
    assert read == "sieve<eos>token<eos>to\nthelast<eos>"
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)


def test_long_files_are_read_in_pieces_of_one_document(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text(sentences(50))
    tokenizer = characters()
    whole = [block["input_ids"].tolist() for block in TokenBlocks(open_text(tmp_path), tokenizer, 32)]
    monkeypatch.setattr("attnsieve.nn.corpus._PIECE", 100)
    pieces = list(open_text(tmp_path)())
    assert len(pieces) > 10
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [block["input_ids"].tolist() for block in TokenBlocks(open_text(tmp_path), tokenizer, 32)] == whole


def test_files_that_hold_no_text_are_named(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert list(open_text(tmp_path / "marked.txt")()) == [("one\n", True)]
    for name, content in (("other.txt", b"\xe9\n"), ("other.jsonl", b'{"text": "\xe9"}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not UTF-8 text"):
            list(open_text(tmp_path / name)())
    for content, said in (("null", "None"), ('"\\ud83d"', r"'\\ud83d'")):
        (tmp_path / "none.jsonl").write_text(f'{{"text": {content}}}')
        with pytest.raises(UserError, match=rf'none\.jsonl:1: "text" must be text, got {said}'):
            list(open_text(tmp_path / "none.jsonl")())


def test_bad_input_is_refused(text, tmp_path):
    out, tokenizer = tmp_path / "run", characters()
    for bad, word in (
        (tmp_path / "nowhere.txt", "no text"),
        (tmp_path / "empty", "holds no"),
        (["short"], "fewer than one block"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=word):
            train(fresh(), tokenizer, bad, out, settings())
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n[1]\n')
    with pytest.raises(UserError, match="jsonl:2"):
        train(fresh(), tokenizer, tmp_path / "bad.jsonl", out, settings())
    with pytest.raises(UserError, match="max_position_embeddings"):
        train(fresh(), tokenizer, text, out, settings(length=513))
    with pytest.raises(UserError, match="no checkpoint"):
        train(fresh(), tokenizer, text, out, settings(), resume=True)
    (out / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds"):
        train(fresh(), tokenizer, text, out, settings())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model, which this one would replace"):
        train(fresh(), tokenizer, text, tmp_path / "model", settings())
    for changes in ({"steps": 0}, {"warmup": 7}, {"precision": "int8"}, {"learning_rate": -1.0}):
        with pytest.raises(UserError, match=next(iter(changes))):
            settings(**changes)


def test_two_processes_train_one_model(tmp_path):
    report = report_of("nn_worker.py", tmp_path)
    assert report["ranks_agree"]
    assert report["losses"][-1] < report["losses"][0]
    assert report["sharded_error"] < 1e-6
    assert report["sharded_A"] == 1
