"""The ablation script at a tiny size: every factor is varied alone, nothing is measured twice, failures are rows."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.cli_tiny import save_tiny_model


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    script = importlib.import_module("ablation")

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, arguments)])
        script.main()

    script.run = run
    return script


def test_one_factor_at_a_time(ablation, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 80)
    model = save_tiny_model(tmp_path / "model", positions=1024)
    levels = [
        "--pcls",
        "8,16",
        "--lams",
        "1",
        "--taus",
        "0.2,2.5",
        "--mus",
        "0.5",
        "--counts",
        "1",
        "--domains",
        "text,code,dialogue",
    ]
    sizes = ["--pcl", 16, "--documents", 2, "--length", 256, "--items", 2, "--device", "cpu"]
    ablation.run(model, "--text", tmp_path / "text.txt", *levels, *sizes, "--out", tmp_path / "rows.jsonl")
    out = tmp_path / "rows-0.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    varied = [(row["factor"], row[row["factor"]]) for row in rows[1:]]
    assert varied == [
        ("pcl", 8), ("lam", 1.0), ("tau", 0.2), ("tau", 2.5), ("mu", 0.5), ("documents", 1), ("domain", "code"), ("domain", "dialogue"),
    ]  # fmt: skip
    assert rows[0]["factor"] == "base"
    for row in rows[1:]:
        same = {"preset", "pcl", "lam", "tau", "mu", "documents", "domain"} - {row["factor"]}
        assert all(row[name] == rows[0][name] for name in same)
    failed = [row for row in rows if row["failure"]]
    assert [row["tau"] for row in failed] == [2.5]
    assert "keep no key in any row" in failed[0]["failure"]
    good = [row for row in rows if not row["failure"]]
    assert all(0 < row["density"] <= 1 and row["calibration"]["seconds"] > 0 for row in good)
    assert good[1]["calibration"]["bytes_of_sums"] < good[0]["calibration"]["bytes_of_sums"]
    metrics = {(score["task"], score["metric"]) for score in good[0]["scores"]}
    assert {("perplexity", "nll"), ("fidelity", "kl"), ("fidelity", "retained_mass"), ("kv", "answer_nll")} <= metrics
    assert ablation.score(good[0], "fidelity", "retained_mass")["value"] > 0
    assert len([score for score in good[-1]["scores"] if score["task"] == "perplexity"]) == 2
    table = (tmp_path / "rows.md").read_text()
    assert table.count("\n") == 2 + len(rows)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [row["factor"] for row in rows]
    (tmp_path / "joined.jsonl").write_text(out.read_text())
    ablation.run("of no matter", *levels, *sizes, "--table", "--out", tmp_path / "joined.jsonl")
    assert (tmp_path / "joined.md").read_text() == table
    again = ["--text", tmp_path / "text.txt", *levels, *sizes, "--out", tmp_path / "rows.jsonl"]
    ablation.run(model, *again)
    assert len(out.read_text().splitlines()) == len(rows)
    ablation.run(model, *again, "--shard", "1/9")
    (shared,) = (tmp_path / "rows-1.jsonl").read_text().splitlines()
    assert json.loads(shared)["pcl"] == 8


def test_calibration_and_scoring_read_different_text(ablation):
    for source in (ablation.code(), ablation.dialogue()):
        whole = source.read(50_000)[:50_000]
        early, late = (ablation.part_of(source, *part, 50_000).read(1) for part in ((0, 0.6), (0.6, 1)))
        assert early + late == whole
        assert len(early) == 30_000
    assert ablation.dialogue().read(30_000).count("USER") > 50
    assert "import" in ablation.code().read(1)
