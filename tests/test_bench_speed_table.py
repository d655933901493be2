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


def test_choosing_is_in_the_time_and_in_the_speed_up(table):
    found = table.newest(rows())
    lines = table.chosen_lines(found)
    assert len(lines) == len(table.RULES) * len(table.CHOSEN_LENGTHS)
    whole = found["prefill", table.KEPT + table.RULES[0], "auto: triton", 131072, True]
    line = lines[len(table.CHOSEN_LENGTHS) - 1]
    assert line[1] == "128K"
    assert line[5] == table.written(whole["ms_p50"], "ms")
    assert float(line[6]) == pytest.approx(whole["baseline_ms_p50"] / whole["ms_p50"], rel=0.02)


def test_what_auto_took_counts_as_that_backend_but_for_building(table):
    row = next(row for row in rows() if row["mask"] == "C" and row["backend"] == "fa4" and row["kv_len"] == 32768)
    later = row | {"backend": "auto: fa4", "date": "2999-01-01", "ms_p50": 1.0}
    alone, built = ({**each, "includes_mask_building": building} for building in (False, True) for each in (later,))
    found = table.newest([row, alone, built])
    assert found["prefill", "C", "fa4", 32768, False]["ms_p50"] == 1.0
    assert ("prefill", "C", "auto: fa4", 32768, True) in found


def test_numbers_have_three_digits(table):
    assert [table.written(ms, "ms") for ms in (203.8, 23.68, 0.0429, 1.0)] == ["204 ms", "23.7 ms", ".0429 ms", "1 ms"]


def test_models_are_told_by_length(table):
    lines = table.model_lines([row for row in rows() if row["mask"] in ("dense()", table.PATTERN)])
    assert [line[:2] for line in lines[:3]] == [["llama-3.1-8b", f"1 x {length}"] for length in ("8K", "32K", "128K")]
    assert lines[3][:2] == ["llama-3.2-3b", "16 x 8K"]
    assert lines[2][-2:] == ["45.6 GiB", "45.6 GiB"]
