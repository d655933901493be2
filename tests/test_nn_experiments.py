"""The experiment scripts at tiny sizes: rows, nothing measured twice, a table and a figure."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from tests.cli_tiny import save_tiny_model
from tests.nn_tiny import VOCAB, dma
from tests.test_nn_layers import OPTIONS

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def command(monkeypatch):
    """Run a script in this process with these arguments."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()

    return run


def rows_of(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all({"device", "versions", "commit", "command", "date"} <= set(row) for row in rows)
    return rows


def test_recall(command, tmp_path, capsys):
    out = tmp_path / "mqar.jsonl"
    sizes = ["--shapes", "32x16,16x16+noise", "--steps", 3, "--batch", 4, "--vocabulary", 64, "--rates", 0.01]
    options = ["--device", "cpu", "--minutes", 9, "--test-examples", 4, "--layers", "mha,dma,nsa", "--out", out]
    command("mqar", *sizes, *options)
    rows = rows_of(out)
    assert [row["layer"] for row in rows] == ["mha", "dma", "dma", "nsa", "nsa"] * 2
    assert [(row["length"], row["noise"]) for row in rows] == [(32, False)] * 5 + [(16, True)] * 5
    assert [row["keep"] for row in rows] == [32, 16, 4, 16, 4, 16, 8, 2, 8, 2]
    assert all(set(row["accuracy"]) == {"8", "4", "2"} for row in rows[:5])
    assert all(row["trained_steps"] == 3 and row["finished"] for row in rows)
    assert "| dma, w = n/8 |" in out.with_suffix(".md").read_text()
    assert {"A", "bias"} == set().union(*(set(row) for row in rows)) - set(rows[0])
    assert "| 32" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 5000
    command("mqar", *sizes, *options)
    assert len(rows_of(out)) == len(rows)
    with out.open("a") as file:
        for cut in (rows[0] | {"seed": 1}, rows[1]):  # the second was trained again
            file.write(json.dumps(cut | {"finished": False}) + "\n")
    command("mqar", *sizes, *options, "--layers", "swa", "--minutes", 0)
    assert len(rows_of(out)) == len(rows) + 2
    assert "1 of 11 models ran out of time before their last step" in out.with_suffix(".md").read_text()
    assert "0.01, seed" in capsys.readouterr().out


def test_recall_of_a_model_that_becomes_nan(command, tmp_path, monkeypatch, capsys):
    recall = importlib.import_module("mqar").Recall
    loss = recall._loss
    broken = lambda one, random: loss(one, random) * (float("nan") if one.cell.layer == "dma" else 1)  # noqa: E731
    monkeypatch.setattr(recall, "_loss", broken)
    out = tmp_path / "mqar.jsonl"
    options = ["--steps", 3, "--batch", 4, "--vocabulary", 64, "--test-examples", 4, "--rates", 0.01, "--device", "cpu"]
    options += ["--shapes", "32x16", "--parts", 2, "--layers", "dma,mha,dma-window", "--out", out]
    command("mqar", *options)
    rows = rows_of(out)
    assert [(row["layer"], row.get("diverged"), "A" in row) for row in rows] == [
        ("dma", True, False),
        ("mha", None, False),
        ("dma-window", None, True),
    ]
    assert set(rows[0]["accuracy"].values()) == {0.0}
    assert (rows[0]["diverged_at"], rows[0]["diverged_loss"], rows[0]["broken"]) == (1, None, "all")
    assert [[len(look) for look in row.get("bias", [])] for row in rows] == [[2], [], [2]]
    assert all(0.7 < bias < 9 for row in rows[::2] for bias in row["bias"][0])
    assert importlib.import_module("mqar_report").written_cell({0: rows[0]["accuracy"]}, {}, 8) == "not learned"
    assert "NaN, counted as not learned: dma, w = n/2 at 32 tokens, d 16, seed 0." in out.with_suffix(".md").read_text()
    assert "diverged" in capsys.readouterr().out
    command("mqar", *options)
    assert rows_of(out) == rows


def test_a_model_that_became_nan_is_done_when_the_time_is_over():
    module = importlib.import_module("mqar")
    cell = importlib.import_module("mqar_cells").Cell("dma", 16, 16, 1, 8, False, True, 0.01, 0, 500, 4, 64)
    one = module.Recall(cell, torch.device("cpu"), graph=False)
    assert module._numbers(one, 4, finished=False)["finished"] is False
    one.training.step()
    assert not one.training.diverged
    one.training.done = module.CHECK_EVERY
    assert not one.ends()
    with torch.no_grad():
        one.model.decoder.model.layers[0].self_attn.A.fill_(torch.nan)
    assert one.ends()
    numbers = module._numbers(one, 4, finished=False)
    assert numbers["finished"]
    assert numbers["diverged"]


def test_rows_tell_which_step_broke_a_model_and_where():
    module = importlib.import_module("mqar")
    cell = importlib.import_module("mqar_cells").Cell("dma", 16, 16, 1, 8, False, True, 0.01, 0, 500, 4, 64)
    one = module.Recall(cell, torch.device("cpu"), graph=False)
    layer = one.model.decoder.model.layers[1].self_attn
    largest = []
    log_bias = lambda v: layer.A * softplus(layer.dt_proj(v))  # noqa: E731
    layer.v_proj.register_forward_hook(lambda _, inputs, v: largest.append(log_bias(v).max().item()))
    one.training.step()
    one.training.look()
    norm = float(one.training.health.before)
    layer.o_proj.weight.register_hook(lambda grad: grad * float("inf"))
    for _ in range(3):
        one.training.step()
    numbers = module._numbers(one, 4, finished=False)
    assert [look[1] for look in numbers["bias"]] == [round(value, 2) for value in largest]
    assert len(largest) == 2
    assert numbers["diverged_at"] == 2
    assert numbers["broken"] == ["decoder.model.layers.1.self_attn.o_proj.weight"]
    assert 0 < numbers["diverged_loss"] < 9
    assert numbers["norm_before"] == norm > 0
    json.dumps(numbers, allow_nan=False)


def test_recall_of_models_that_did_not_learn_or_did_not_end():
    module = importlib.import_module("mqar_report")
    right, guess = {"8": 0.9, "2": 1.0}, {"8": 0.125, "2": 0.5}
    cells = [
        ({0: right, 1: {"8": 0.7, "2": 1.0}}, {}, "0.800 ± 0.100"),
        ({0: guess, 1: right}, {2: right}, "0.900 (1 of 2)"),
        ({0: guess}, {1: right}, "not learned"),
        ({}, {0: right, 1: guess}, "0.900 cut"),
        ({}, {0: guess}, "-"),
    ]
    assert [module.written_cell(ended, cut, 8) for ended, cut, _ in cells] == [wanted for *_, wanted in cells]
    panels, _ = module.panels_of({"32 tokens": {"mha": {0: guess}, "dma, w = n/8": {0: guess, 1: right}}})
    assert set(panels["32 tokens, w = n/8"]) == {"dma", "any value of the row", "w / pairs"}
    assert panels["32 tokens, w = n/8"]["w / pairs"] == [(2.0, 1.0, 0.0), (8.0, 0.5, 0.0)]
    assert panels["32 tokens, w = n/8"]["dma"] == [(2.0, 1.0, 0.0), (8.0, 0.9, 0.0)]


def test_recall_of_layers_that_keep_all_keys(command, tmp_path):
    out = tmp_path / "mqar.jsonl"
    options = ["--steps", 2, "--batch", 4, "--vocabulary", 64, "--test-examples", 4, "--rates", 0.01, "--device", "cpu"]
    command("mqar", "--shapes", "16x16", "--layers", "mha,mla", *options, "--out", out)
    assert [row["layer"] for row in rows_of(out)] == ["mha", "mla"]
    assert "| mla" in re.sub(" +", " ", out.with_suffix(".md").read_text())


def test_language_models(command, tmp_path, monkeypatch):
    language, source = importlib.import_module("language"), importlib.import_module("language_text")
    text = "".join(chr(97 + i * i % 23) + " " * (i % 3 == 0) for i in range(9000))
    monkeypatch.setattr(source, "documents", lambda: (("letters", part) for part in source.pieces(text, 400)))
    tokens, out = ["--tokens", tmp_path / "tokens"], tmp_path / "language.jsonl"
    command("language", "prepare", *tokens, "--vocabulary", 280)
    sizes = ["--hidden", 32, "--intermediate", 64, "--depth", 2, "--heads", 2, "--length", 32, "--keep", 8, "--batch", 4]
    layers = ["mha", "dma", "dma-all", "swa-quarter"]
    options = ["--device", "cpu", "--windows", 2, "--layers", ",".join(layers), "--rate", 0.01, "--steps", 25, "--out", out]
    command("language", "train", *tokens, *sizes, *options)
    rows = rows_of(out)
    assert [row["layer"] for row in rows] == layers
    assert all(row["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.02) for row in rows)
    assert rows[2]["nll"] != rows[1]["nll"]
    assert all(row["curve"][-1] < row["curve"][0] - 0.5 for row in rows)
    assert set(rows[0]["by_position"]) == {"32"}
    assert rows[0]["text"] == {"letters": len(text)}
    assert "| dma " in out.with_suffix(".md").read_text()
    command("language", "train", *tokens, *sizes, *options)
    assert len(rows_of(out)) == 4
    cut = rows[1] | {"layer": "nsa", "finished": False, "curve": [5.0, 4.5], "trained_tokens": 256}
    language.report(out, [cut | {"layer": "dma"}, *rows, cut])
    table = out.with_suffix(".md").read_text()
    assert f"| nsa (cut) | {cut['parameters'] / 1e6:.2f} | 0.0 | 4.50 |" in re.sub(" +", " ", table)
    assert "training batch at step 2" in table
    assert "nsa seed 0 after 2" in table
    assert "dma (cut)" not in table
    language.report(out, [*rows, rows[0] | {"seed": 1, "finished": False, "nll": 99.0}])
    assert "mha (cut)" not in (table := out.with_suffix(".md").read_text())
    assert "99.0" not in table
    assert "mha seed 1 after" in table
    out.write_text("".join(json.dumps(row | {"finished": row["layer"] != "dma"}) + "\n" for row in rows))
    command("language", "train", *tokens, *sizes, *options)
    assert [row["layer"] for row in rows_of(out)[4:]] == ["dma"]


def test_language_models_that_become_nan(command, tmp_path, monkeypatch):
    language, source = importlib.import_module("language"), importlib.import_module("language_text")
    monkeypatch.setattr(source, "documents", lambda: iter([("letters", "several words to learn ")] * 400))
    tokens, out = ["--tokens", tmp_path / "tokens"], tmp_path / "language.jsonl"
    command("language", "prepare", *tokens, "--vocabulary", 280)
    losses = language.token_losses

    def broken(model, ids):
        return losses(model, ids) * (float("nan") if model.config.attention == "dma" and model.training else 1)

    monkeypatch.setattr(language, "token_losses", broken)
    options = ["--hidden", 32, "--intermediate", 64, "--depth", 1, "--heads", 2, "--length", 32, "--keep", 8, "--batch", 4]
    options += ["--device", "cpu", "--windows", 2, "--steps", 39, "--out", out]
    command("language", "train", *tokens, *options, "--layers", "dma")
    assert not out.with_suffix(".md").exists()
    command("language", "train", *tokens, *options, "--layers", "dma,mha")
    rows = rows_of(out)
    assert [(row["layer"], row.get("diverged"), row["finished"]) for row in rows] == [("dma", True, True), ("mha", None, True)]
    assert rows[0]["curve"] == []
    assert [folder.name for folder in out.with_suffix("").iterdir()] == ["mha-0"]
    assert "NaN, left out: dma seed 0." in out.with_suffix(".md").read_text()


def tokens_and_models(folder: Path, layers: tuple[str, ...]) -> None:
    """What prepare and train leave behind, without training."""
    torch.manual_seed(0)
    (folder / "tokens").mkdir()
    ids = np.random.default_rng(0).integers(0, VOCAB, 6000).astype(np.uint16)
    importlib.import_module("language_text").save_tokens(folder / "tokens", "held_out", ids)
    for layer in layers:
        dma(attention=layer, **OPTIONS[layer]).save_pretrained(folder / "models" / f"{layer}-0")


def test_needles(command, tmp_path):
    tokens_and_models(tmp_path, ("gqa", "dma"))
    out = tmp_path / "needle-long.jsonl"
    cut = [{"layer": layer, "seed": 0, "finished": layer != "dma"} for layer in ("gqa", "dma")]
    (tmp_path / "language-long.jsonl").write_text("\n".join(map(json.dumps, cut)))
    options = ["--models", tmp_path / "models", "--tokens", tmp_path / "tokens", "--lengths", "320,400", "--depths", "0,0.5"]
    command("needle", *options, "--items", 2, "--device", "cpu", "--out", out)
    rows = rows_of(out)
    assert len(rows) == 8
    assert all(row["exact"] <= 1 and row["trained_length"] == 512 and row["nll"] > 0 for row in rows)
    assert (tmp_path / "needle-long-answer.png").exists()
    table = (tmp_path / "needle-long.md").read_text()
    assert "| gqa " in table
    assert "| dma " not in table
    assert "not trained to the end: dma seed 0" in table
    assert (tmp_path / "needle-long-text.png").exists()
    (tmp_path / "needle-long-text.png").unlink()
    command("needle", "--tokens", "nowhere", "--minutes", 0, "--out", out)
    assert (tmp_path / "needle-long-text.png").exists()
    command("needle", *options, "--items", 2, "--device", "cpu", "--out", out)
    assert len(rows_of(out)) == 8


def test_a_needle_is_where_it_should_be():
    needle = importlib.import_module("needle")
    ids, answers = needle.contexts(torch.arange(5000), 400, 0.5, 3, 100000, 0)
    assert ids.shape == (6, 400)
    size = needle.CUE + needle.ANSWER
    for row, without, answer in zip(ids[:3], ids[3:], answers, strict=True):
        assert torch.equal(row[-needle.ANSWER :], answer)
        assert torch.equal(row[176 : 176 + size], row[-size:])
        assert not torch.equal(without[176 : 176 + size], row[-size:])
        assert torch.equal(without[-size:], row[-size:])
        assert torch.equal(row[:176], without[:176])


def test_conversion(command, tmp_path, monkeypatch):
    module = importlib.import_module("convert")
    monkeypatch.setattr(
        module, "documents", lambda: iter([("code", "def function(argument): return argument + 1\n" * 200)] * 40)
    )
    model = save_tiny_model(tmp_path / "tiny")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<s>"}))
    out = tmp_path / "convert.jsonl"
    options = ["--steps", 4, "--length", 64, "--batch", 2, "--tokens", 20000, "--lengths", 256, "--items", 2, "--rate", 0.01]
    command("convert", model, "--keeps", 300, *options, "--device", "cpu", "--out", out)
    rows = rows_of(out)
    assert [(row["stage"], row["keep"]) for row in rows] == [("dense", 0), ("converted", 300), ("trained", 300)]
    nll = [row["nll@256"] for row in rows]
    assert nll[1] == pytest.approx(nll[0], abs=0.05)
    assert nll[2] < nll[1]
    assert "converted" in out.with_suffix(".md").read_text()


def test_kernel_rows(command, tmp_path):
    out = tmp_path / "dma.jsonl"
    options = [
        "--device",
        "cpu",
        "--lengths",
        "256,300",
        "--budgets",
        "32",
        "--baselines",
        "sdpa",
        "--windows-by",
        "auto",
        "--shape",
        "smollm2-135m",
    ]
    command("dma", "forward", "backward", "decode", "windows", *options, "--budget-ms", 1, "--out", out)
    rows = rows_of(out)
    sparse = [(row["op"], row["mask"], row["kv_len"]) for row in rows if row["mask"] != "dense()"]
    assert set(sparse) == {
        *((op, "dma-32", n) for op in ("prefill", "forward_backward", "decode") for n in (256, 300)),
        *(("prefill", "window(32)", n) for n in (256, 300)),
    }
    assert all(row["baseline"] and row["speedup"] for row in rows if row["mask"] != "dense()")
    module = [row for row in rows if row["backend"] == "dynamic_mask_attention"]
    assert all(row["speedup"] > 0 and row["includes_mask_building"] for row in module)
    assert len({row["peak_bytes"] for row in module if row["op"] == "decode"}) == 1
    before = len(rows)
    command("dma", "forward", "decode", *options, "--budget-ms", 1, "--out", out)
    assert len(rows_of(out)) == before
