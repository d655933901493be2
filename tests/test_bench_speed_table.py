"""The table of speed in docs/RESULTS.md is made of the newest rows."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed_table

    return speed_table


def rows(name="kernels"):
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()]


def test_every_line_has_rows_and_the_newest_ones_count(table):
    found = rows() + rows("dma")
    lines = table.layer_lines(table.newest(found))
    assert len(lines) == sum(len(lengths) for *_, lengths in table.LINES)
    slower = [*found, *(row | {"baseline_ms_p50": row["baseline_ms_p50"] and row["baseline_ms_p50"] / 10} for row in found)]
    again = table.layer_lines(table.newest(slower))
    assert all(float(now[6]) < float(before[6]) for now, before in zip(again, lines, strict=True))


def test_the_order_of_files_does_not_matter_and_dma_counts_with_its_selection(table):
    one, other = (table.newest(found) for found in (rows() + rows("dma"), rows("dma") + rows()))
    assert one == other
    assert all(key[-1] for key in one if key[2] == table.DMA)
    with pytest.raises(SystemExit, match="no row of"):
        table.layer_lines(table.newest(rows()))


def test_ours_stands_beside_flexattention_by_its_faster_backend(table):
    found = table.newest(rows())
    lines = table.flex_lines(found)
    assert len(lines) == sum(len(lengths) for *_, lengths in table.FLEX_LINES)
    assert [line[3] for line in lines if line[0].startswith("scattered")] == ["not served"]
    columns = found["prefill", "C", "fa4", 8192, False]["ms_p50"]
    assert columns < found["prefill", "C", "triton", 8192, False]["ms_p50"]
    assert table.written(columns, "ms") in next(line for line in lines if line[0].startswith("1000"))


def test_numbers_have_three_digits(table):
    assert [table.written(ms, "ms") for ms in (203.8, 23.68, 0.0429, 1.0)] == ["204 ms", "23.7 ms", ".0429 ms", "1 ms"]


def test_models_are_told_by_length(table):
    lines = table.model_lines([row for row in rows() if row["mask"] in ("dense()", table.PATTERN)])
    assert [line[:2] for line in lines[:3]] == [["llama-3.1-8b", f"1 x {length}"] for length in ("8K", "32K", "128K")]
    assert lines[3][:2] == ["llama-3.2-3b", "16 x 8K"]
    assert lines[2][-2:] == ["45.6 GiB", "45.6 GiB"]
