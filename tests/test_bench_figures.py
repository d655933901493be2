"""Figures from benchmark rows: drawn for every operation that has rows, the newest of repeated measurements."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def figures():
    path = Path(__file__).parent.parent / "benchmarks" / "figures.py"
    spec = importlib.util.spec_from_file_location("bench_figures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(**change):
    base = {
        "op": "prefill",
        "backend": "triton",
        "mask": "C",
        "shape": "s",
        "device": "gpu",
        "q_len": 8,
        "kv_len": 8192,
        "batch": 1,
    }
    base |= {
        "dtype": "bfloat16",
        "includes_mask_building": False,
        "density": 0.1,
        "speedup": 7.0,
        "ms_p50": 2.0,
        "peak_bytes": 9,
    }
    return base | change


def test_figures_of_what_was_measured(figures, tmp_path, monkeypatch, capsys):
    rows = [row(), row(kv_len=32768), row(op="ttft", mask="dense()", density=1, speedup=None), row(op="ttft", ms_p50=None)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path), "--format", "svg"])
    figures.main()
    assert {path.name for path in tmp_path.glob("*.svg")} == {"prefill-by-density.svg", "prefill-by-length.svg", "ttft.svg"}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_newest_measurement_counts_and_building_does_not(figures):
    found = figures.newest([row(speedup=1.0), row(speedup=2.0), row(speedup=9.0, includes_mask_building=True)])
    assert [one["speedup"] for one in found] == [2.0]


def test_speed_is_drawn_for_the_shape_that_was_measured_most(figures):
    rows = [row(shape="other"), row(), row(kv_len=32768)]
    assert figures.of_one_shape(rows) == rows[1:]
