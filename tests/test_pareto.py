"""The accuracy curves at a tiny size: plans are made once, work is shared, rows join, tables and figures come of them."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from threading import Timer

import pytest
import torch

from attnsieve import Plan
from attnsieve.evaluation import read_rows
from attnsieve.evaluation.rows import Row, append_rows
from attnsieve.hf import fingerprint
from attnsieve.hf.loading import load_model
from attnsieve.profiling import Measurement
from tests.cli_tiny import save_tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        found = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        found.main()
        return found

    return run


def test_separators_in_the_texts_of_rows_do_not_tear_them(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    row = Row(**{field.name: 1 for field in fields(Row)} | {"command": "one\u2028two", "metric": "answer_nll"})
    append_rows(tmp_path / "rows-0.jsonl", [row])
    assert importlib.import_module("pareto").join(tmp_path) == [row]


def test_two_shards_make_plans_rows_and_figures(script, tmp_path, capsys):
    model, out = save_tiny_model(tmp_path / "tiny", positions=1024), tmp_path / "out"
    sizes = ["--lengths", 900, "--items", 2, "--tasks", "kv,passkey", "--calibration", 1, "--device", "cpu", "--out", out]
    few = [
        "--groups",
        "fixed,budget-kv,profiled",
        "--only",
        "budget,streaming-llm-0.2,streaming-llm-0.25,dam-paper,streaming-llm-prompt",
    ]
    few += ["--railed", "streaming-llm-0.25"]
    script("pareto", model, *sizes, *few, "--shard", "0/2")
    rows = read_rows(out / "rows-0.jsonl")
    plans = {row.plan for row in rows}
    assert {
        "dense",
        "streaming-llm-0.2",
        "streaming-llm-0.25",
        "dam-paper-450",
        "budget-kv-0.5",
        "streaming-llm-prompt-0.25",
    } <= plans
    assert {row.variant for row in rows} == {"aligned spread"}
    density = {(row.plan, row.task): row.density for row in rows}
    assert density["streaming-llm-0.25", "kv"] < density["streaming-llm-prompt-0.25", "kv"] < 0.5
    assert {row.metric for row in rows} == {"exact_match", "answer_nll", "answer_kl"}
    for row in rows:
        if row.plan.startswith("budget-kv-"):
            assert row.density <= float(row.plan.removeprefix("budget-kv-")) + 0.02
    assert "streaming-llm-0.2:" in capsys.readouterr().out
    script("pareto", model, *sizes, *few, "--shard", "1/2")
    assert not (out / "rows-1.jsonl").exists()
    # What another process did stays done when its claims are lost.
    for claim in (out / "claims").iterdir():
        claim.unlink()
    script("pareto", model, *sizes, *few)
    assert len(read_rows(out / "rows-0.jsonl")) == len(rows)

    with (out / "rows-7.jsonl").open("w") as torn:
        torn.write((out / "rows-0.jsonl").read_text()[:-40])
    script("pareto_figures", out, "--out", tmp_path / "results" / "eval")
    joined = read_rows(tmp_path / "results" / "eval.jsonl")
    assert sorted(map(repr, joined)) == sorted(map(repr, rows))
    made = {path.name for path in (tmp_path / "results").iterdir()}
    assert {
        "eval-tiny-answer_nll.png",
        "eval-tiny-exact_match.png",
        "eval-tiny-answer_kl-prompt.png",
        "eval-plans.jsonl",
        "eval.md",
    } <= made
    notes = [json.loads(line) for line in (tmp_path / "results" / "eval-plans.jsonl").read_text().splitlines()]
    assert {note["plan"] for note in notes} == plans - {"dense"}
    (paper,) = [note for note in notes if note["plan"].startswith("dam-paper")]
    assert (paper["pcl"], paper["reach_bound"]) == (450, 2 * 449)
    text = (tmp_path / "results" / "eval.md").read_text()
    # Of both tasks the best of ours and of the published ones stand above the table.
    assert text.count("| tiny ") == len(plans - {"dense"}) * 2 + 4


def test_near_plans_take_no_wide_window(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plans = importlib.import_module("pareto_plans")
    model, tokenizer = load_model(str(save_tiny_model(tmp_path / "tiny", positions=1024)), device="cpu")
    workshop = plans.Workshop(model, tokenizer, ("kv",), "python-docs", 1, tmp_path / "measured")
    monkeypatch.setattr(plans, "STRICT", (0.5,))
    made = plans.near_budgets(workshop, 700)
    assert set(made) == {f"budget{every}-near{rails}-0.5" for every in ("", "-all") for rails in ("", "-fitted-prompt")}
    heads = [pattern for plan in made.values() for layer in plan.patterns for pattern in layer]
    assert {atom.tokens for pattern in heads for atom in pattern if atom.name == "window"} == {32}
    (measured, _) = plans.measured(workshop, 700, "none", rows=64)
    assert "sink(4) | window(350)" in measured.candidates


def test_answering_plans_are_measured_on_answers_at_the_end(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plans = importlib.import_module("pareto_plans")
    model, tokenizer = load_model(str(save_tiny_model(tmp_path / "tiny", positions=1024)), device="cpu")
    workshop = plans.Workshop(model, tokenizer, ("kv",), "python-docs", 1, tmp_path / "measured")
    texts = workshop.single_questions("kv", 700)
    assert [len(text) for text in texts] == [700, 700]
    for text in texts:
        *pairs, _, question = tokenizer.decode(text).split("\n")
        assert question in pairs
    monkeypatch.setattr(plans, "STRICT", (0.5,))
    for group, name in (("answering", "budget-answers-0.5"), ("answering-all", "budget-all-answers-0.5")):
        made = plans.GROUPS[group](workshop, 700)
        assert set(made) == {name}
        assert [kind.get("last") for kind in made[name].provenance["measurement"]["worst_of"]] == [None, None, 16]
    for place in (tmp_path / "measured").glob("*/*"):
        candidates = Measurement.from_pretrained(place).candidates
        assert any("rows=64" in text for text in candidates) == ("-thorough" in place.parent.name)


def test_a_list_is_worked_through_in_order(script, tmp_path, capsys):
    model, out = save_tiny_model(tmp_path / "tiny", positions=1024), tmp_path / "out"
    size = f"{model} --lengths 900 --items 2 --calibration 1 --device cpu"
    (tmp_path / "list").write_text(
        f"# the first line\n{size} --tasks passkey --groups fixed \\\n  --only window-0.2\n\n"
        f"{size} --tasks kv --groups fixed,chosen --only window-0.25,keys-0.9\n"
        f"{size} --tasks passkey --groups fixed --only window-0.25\n"
    )
    script("worklist", tmp_path / "list", "--out", out, "--shard", "0/2")
    found = [(row.task, row.plan) for row in read_rows(out / "rows-0.jsonl") if row.metric == "answer_nll"]
    assert found == [
        ("passkey", "dense"), ("passkey", "window-0.2"),
        ("kv", "dense"), ("kv", "window-0.25"), ("kv", "keys-0.9"),
        ("passkey", "window-0.25"),
    ]  # fmt: skip
    capsys.readouterr()
    script("worklist", tmp_path / "list", "--out", out, "--shard", "1/2")
    assert not (out / "rows-1.jsonl").exists()
    assert capsys.readouterr().out.startswith("ended with")


def test_a_run_is_tried_again_where_memory_ran_out(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pareto = importlib.import_module("pareto")
    monkeypatch.setattr(pareto, "PAUSE", 0.0)
    calls = []

    def full(times):
        def run():
            calls.append(times)
            if len(calls) <= times:
                raise torch.OutOfMemoryError("full")
            return ["row"]

        return run

    assert pareto.patiently(full(2)) == ["row"]
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        pareto.patiently(full(pareto.TRIES))
    assert len(calls) == pareto.TRIES


def test_nothing_begins_after_the_time(script, tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    script("pareto", model, "--seconds", 0, "--device", "cpu", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_claims_are_exclusive_and_void_with_their_process(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    board = importlib.import_module("claims").Board(tmp_path)
    assert board.claim("kv 4096 budget/0.1")
    assert not board.claim("kv 4096 budget/0.1")
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    (tmp_path / "other").write_text(str(ended.pid))
    assert board.claim("other")
    assert (tmp_path / "other").read_text() == str(os.getpid())
    (tmp_path / "done").write_text(str(ended.pid))
    board.finish("done")
    assert not board.claim("done")


def test_a_void_claim_is_handed_on_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    first, second = (importlib.import_module("claims").Board(tmp_path) for _ in range(2))
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    (tmp_path / "other").write_text(str(ended.pid))
    look = os.kill

    def meanwhile(*arguments):
        monkeypatch.setattr(os, "kill", look)
        assert first.claim("other")
        look(*arguments)

    monkeypatch.setattr(os, "kill", meanwhile)
    assert not second.claim("other")


def test_a_fleet_shares_gpus_and_ends_in_time(script, tmp_path, capsys):
    code = (
        "import os, sys, time; print(sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(60 * (sys.argv[1] == '3/4'))"
    )
    logs = tmp_path / "logs"
    script(
        "fleet",
        "--gpus",
        2,
        "--first",
        1,
        "--each",
        2,
        "--seconds",
        3,
        "--logs",
        logs,
        "--",
        sys.executable,
        "-uc",
        code,
        "{shard}",
    )
    assert "3 of 4 copies ended well" in capsys.readouterr().out
    assert [(logs / f"{n}.log").read_text() for n in range(4)] == ["0/4 1\n", "1/4 2\n", "2/4 1\n", "3/4 2\n"]


def test_a_layer_that_another_process_left_is_tried(script, tmp_path):
    model, out = save_tiny_model(tmp_path / "tiny", positions=1024), tmp_path / "out"
    network, _ = load_model(model)
    Plan.uniform(fingerprint(network), "sink(1) | window(8)").save_pretrained(tmp_path / "narrow")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out / "claims").mkdir(parents=True)
    (out / "claims" / "narrow L1").write_text(str(other.pid))
    end = Timer(4, lambda: (other.kill(), other.wait()))
    end.start()
    sizes = ["--length", 500, "--items", 2, "--layers", 1, "--device", "cpu", "--seconds", 40, "--out", out]
    script("heads", model, tmp_path / "narrow", *sizes)
    assert not end.is_alive()
    assert {"narrow L0", "narrow L1"} < {row.plan for row in read_rows(out / "rows-0.jsonl")}


def test_restored_layers_and_heads(script, tmp_path):
    model, out = save_tiny_model(tmp_path / "tiny", positions=1024), tmp_path / "out"
    network, _ = load_model(model)
    plan = Plan.uniform(fingerprint(network), "sink(1) | window(8)")
    plan.save_pretrained(tmp_path / "narrow")
    sizes = ["--length", 500, "--items", 2, "--layers", 1, "--device", "cpu", "--out", out]
    script("heads", model, tmp_path / "narrow", *sizes)
    rows = {row.plan: row for row in read_rows(out / "rows-0.jsonl") if row.metric == "answer_nll"}
    assert {"dense", "narrow", "narrow L0", "narrow L1"} < set(rows)
    assert len(rows) == 4 + 4
    best = min(("narrow L0", "narrow L1"), key=lambda name: rows[name].value)
    assert {name for name in rows if " H" in name} == {f"{best} H{head}" for head in range(4)}
    assert rows["narrow L0"].density > rows[f"{best} H1"].density > rows["narrow"].density
    text = (out / "heads.md").read_text()
    assert text.count("| narrow") == 7
    assert text.count("sink(1) \\| window(8)") == 8


def test_the_summary_says_who_holds_and_who_is_above(script, capsys):
    script("pareto_summary", BENCHMARKS / "results" / "eval-spread.jsonl", "--model", "qwen2.5-coder-0.5b", "--tasks", "kv")
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if len(line) > 2}
    assert len(cells["budget 20 %, with rails"]) == 5
    assert cells["budget-prompt-0.2"][:3] == ["3", "3", "3"]
    assert cells["kv 4K, rails"][0].startswith("-")
    runs, trail, _, fewer = cells["without"]
    # Of kv alone, where all trail one of ours with no more pairs, the nearest of 8K by ten errors.
    assert int(runs) == int(trail) > 50
    assert cells["kv 8K"][0].startswith("-10.8: xattention-0.9, 33 %")
    assert fewer == "0"


def test_published_runs_are_compared_with_ours_on_the_same_documents(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    summary = importlib.import_module("pareto_summary")
    some = {field.name: 1 for field in fields(Row)} | {"task": "kv", "metric": "answer_nll"}
    given = (("minference-0.8", 0.07, 12), ("minference-0.8", 0.07, 32), ("budget-0.05", 0.05, 12), ("budget-0.1", 0.1, 32))
    rows = [Row(**some | {"plan": plan, "density": density, "items": items}) for plan, density, items in given]

    def compared(rows):
        matched = summary.matches(summary.runs_by_place(rows)["kv", 1], rails=False)
        return [(run["answer_nll"].items, [own["answer_nll"].plan for own in ours]) for run, ours in matched]

    # The 32 documents hold none of ours with as few pairs, the 12 do; more documents win where both do.
    assert compared(rows) == [(12, ["budget-0.05"])]
    assert compared([*rows, Row(**some | {"plan": "budget-near-0.05", "density": 0.05, "items": 32})]) == [
        (32, ["budget-near-0.05"])
    ]
    assert compared(rows[1:2] + rows[3:]) == [(32, [])]


def test_of_a_plan_run_twice_the_run_with_more_documents_is_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    figures = importlib.import_module("pareto_figures")
    some = {field.name: 1 for field in fields(Row)}
    few, many, other = (
        Row(**some | {"plan": plan, "items": items}) for plan, items in (("a-0.2", 12), ("a-0.2", 32), ("b-0.2", 12))
    )
    assert figures.of_most_documents([many, few, other]) == [many, other]
    assert figures.of_most_documents([few, other]) == [few, other]


def test_coverage_lists_what_was_measured_of_every_family(script, capsys, tmp_path):
    """Of the rows of before 21:00 on 23 November 2026, to which later runs add."""
    files = [tmp_path / f"eval-spread{end}.jsonl" for end in ("-smollm2-cpu", "-plans", "")]
    for file in files:
        lines = (BENCHMARKS / "results" / file.name).read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line).get("date", "") < "2026-11-23T21"))
    script("coverage", *files, "--tasks", "kv")
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    header, cells = lines[2], {line[1]: line for line in lines if len(line) > 2}
    assert cells["minference"][header.index("smollm2 1K")] == "35, 43"
    assert cells["h2o"][header.index("smollm2 1K")] == "-"
    assert "dense" not in cells
