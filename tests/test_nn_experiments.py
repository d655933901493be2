"""The experiment scripts at tiny sizes: rows, nothing measured twice, a table and a figure."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

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
    sizes = ["--length", 32, "--width", 16, "--steps", 3, "--batch", 4, "--vocabulary", 64, "--rates", 0.01]
    options = ["--device", "cpu", "--minutes", 1, "--stages", 1, "--test-examples", 4, "--layers", "mha,dma,nsa", "--out", out]
    command("mqar", *sizes, *options)
    rows = rows_of(out)
    assert len(rows) == 3 * 2
    assert {row["keep"] for row in rows} == {4}
    assert all(0 <= row["accuracy"] <= 1 and row["trained_steps"] == 3 for row in rows)
    assert {"A"} == set().union(*(set(row) for row in rows)) - set(rows[0])
    assert "| 32" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 5000
    command("mqar", *sizes, *options)
    assert len(rows_of(out)) == len(rows)
    assert "0.01, seed" in capsys.readouterr().out


def test_language_models(command, tmp_path, monkeypatch):
    language = importlib.import_module("language")
    text = "".join(chr(97 + i * i % 23) + " " * (i % 3 == 0) for i in range(9000))
    monkeypatch.setattr(language, "documents", lambda: iter(language.pieces(text, 400)))
    tokens, out = ["--tokens", tmp_path / "tokens"], tmp_path / "language.jsonl"
    command("language", "prepare", *tokens, "--vocabulary", 280)
    sizes = ["--hidden", 32, "--intermediate", 64, "--depth", 2, "--heads", 2, "--length", 32, "--keep", 8, "--batch", 4]
    options = ["--device", "cpu", "--windows", 2, "--layers", "mha,dma", "--rate", 0.01, "--steps", 25, "--out", out]
    command("language", "train", *tokens, *sizes, *options)
    rows = rows_of(out)
    assert [row["layer"] for row in rows] == ["mha", "dma"]
    assert rows[1]["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.02)
    assert all(row["curve"][-1] < row["curve"][0] - 0.5 for row in rows)
    assert set(rows[0]["by_position"]) == {"32"}
    assert "| dma" in out.with_suffix(".md").read_text()
    command("language", "train", *tokens, *sizes, *options)
    assert len(rows_of(out)) == 2
