"""The experiment scripts at tiny sizes: rows, nothing measured twice, a table and a figure."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def command(monkeypatch):
    """Run a script in this process with these arguments."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()

    return run


def rows_of(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all({"device", "versions", "commit", "command", "date"} <= set(row) for row in rows)
    return rows


def test_recall(command, tmp_path, capsys):
    out = tmp_path / "mqar.jsonl"
    sizes = ["--length", 32, "--width", 16, "--steps", 3, "--batch", 4, "--vocabulary", 64, "--test-examples", 4]
    options = ["--rates", "0.01,0.003"]
    options += ["--device", "cpu", "--minutes", 1, "--stages", 1, "--layers", "mha,dma,nsa", "--out", out]
    command("mqar", *sizes, *options)
    rows = rows_of(out)
    assert len(rows) == 3 * 2 * 2
    assert {row["keep"] for row in rows} == {4}
    assert all(0 <= row["accuracy"] <= 1 and row["trained_steps"] == 3 for row in rows)
    assert {"A"} == set().union(*(set(row) for row in rows)) - set(rows[0])
    assert "| 32" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 5000
    command("mqar", *sizes, *options)
    assert len(rows_of(out)) == len(rows)
    assert "0.01, seed" in capsys.readouterr().out
