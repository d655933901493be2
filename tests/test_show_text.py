"""Views, summaries and tables."""

import json

import pytest
import torch

from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import LongStatistics, Profile
from attnsieve.show import (
    head_view,
    markdown,
    parse_heads,
    percent,
    plan_summary,
    plan_text,
    profile_summary,
    profile_text,
    result_table,
    spread_heads,
    typical_heads,
)
from attnsieve.show.results import with_error

MODEL = Fingerprint("llama", 2, 3, 1, 16, "0" * 16)


def plan_of(*texts: str, density: list[float] | None = None) -> Plan:
    rows = [[Pattern.parse(text) for text in texts[:3]], [Pattern.parse(text) for text in texts[3:]]]
    return Plan(MODEL, rows, {}, None if density is None else torch.tensor(density).reshape(2, 3))


def first_key_profile(pcl: int = 100, length: int = 200) -> Profile:
    """Half of every row on key 0, half on the query's own key (all of row 0 on key 0)."""
    maps = torch.eye(pcl).mul(0.5)
    maps[:, 0] += 0.5
    rows = length - pcl
    column, offset = torch.zeros(2, 3, length), torch.zeros(2, 3, length)
    column[..., 0], column[..., pcl:] = rows / 2, 0.5
    offset[..., 0], offset[..., pcl:] = rows / 2, 0.5
    long = LongStatistics(length, rows, column, offset)
    return Profile(MODEL, pcl, maps.expand(2, 3, pcl, pcl).clone(), torch.full((pcl,), 7), (long,))


def test_a_view_writes_the_mask_out():
    mask = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
    rule = Pattern.of(Captured.from_mask(mask)) | Pattern.parse("columns(1, start=3)")
    plan = Plan(MODEL, [[rule] * 3, [Pattern.parse("dense()")] * 3])
    view = head_view(0, 2, plan=plan)
    assert view.name == "layer 0, head 2   captured(3) | columns(1, start=3)"
    assert view.captured
    assert view.mean is None
    assert torch.equal(view.mask, mask)
    assert view.extended.shape == (6, 6)
    assert view.extended[3:].nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
    dense = head_view(1, 0, plan=plan, tokens=10)
    assert dense.extended.sum() == 55
    assert not dense.captured


def test_views_name_what_the_plan_knows():
    plan = plan_of(*["dense()"] * 6, density=[0.5, 0.004, 1, 1, 1, 1])
    assert head_view(0, 1, plan=plan).name == "layer 0, head 1   density 0.4 %   dense()"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: head_view(2, 0, plan=plan_of(*["dense()"] * 6)),
            "no layer 2, head 0: the model has layers 0 to 1 of heads 0 to 2",
        ),
        (lambda: head_view(0, 0, plan=plan_of(*["dense()"] * 6), tokens=10**6), "1 to 8192 tokens, got 1000000"),
        (lambda: parse_heads("0:3,5"), "layer:head, counted from 0, as in 0:3,5:1; got '5'"),
        (lambda: parse_heads("-1:2"), "got '-1:2'"),
    ],
)
def test_what_cannot_be_shown_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_profile_and_a_plan_of_different_models_are_not_drawn_together():
    other = Plan.uniform(Fingerprint("llama", 2, 3, 1, 32, "0" * 16), "window(4)")
    with pytest.raises(UserError, match=r"the plan and the profile were made for different models \(head_dim: 32 and 16\)"):
        head_view(0, 0, plan=other, profile=first_key_profile())


def test_which_heads_are_drawn_by_default():
    assert parse_heads("0:3, 5:1") == [(0, 3), (5, 1)]
    rules = ["window(2)", "dense()", "window(3)", "sink(1)", "window(4)", "window(5)"]
    assert typical_heads(plan_of(*rules, density=[0.3, 1, 0.2, 0.5, 0.1, 0.4]), 3) == [(1, 1), (0, 0), (1, 0)]
    assert typical_heads(plan_of(*rules), 2) == [(0, 0), (1, 2)]
    assert typical_heads(plan_of(*["dense()"] * 6), 9) == spread_heads(MODEL, 9) == [(0, 0), (1, 1)]


def test_a_plan_in_numbers_and_in_words():
    plan = plan_of("window(2)", "dense()", *["sink(1)"] * 4, density=[0.1, 1, 0.1, 0.2, 0.2, 0.2])
    summary = plan_summary(plan)
    assert summary["heads"] == {"static": 5, "dense": 1}
    assert summary["density"] == pytest.approx(0.3)
    assert [layer["density"] for layer in summary["layers"]] == pytest.approx([0.4, 0.2])
    assert json.loads(json.dumps(summary)) == summary
    assert "|     0 |        40 |          - | 1 dense, 2 static |" in plan_text(plan)


def test_a_profile_in_numbers_and_in_words():
    profile = first_key_profile()
    layer = profile_summary(profile)["layers"][1]
    assert layer["layer"] == 1
    assert layer["first_4_at_200"] == pytest.approx(0.5)
    assert layer["nearest_64_at_200"] == pytest.approx(0.5)
    # Rows 0 to 3 hold all their mass in the first four keys, the others half of it.
    assert layer["first_4_at_100"] == pytest.approx((4 + 96 / 2) / 100)
    # Key 0 is near for 64 rows.
    assert layer["nearest_64_at_100"] == pytest.approx((64 + 36 / 2) / 100)
    assert "| layer | first 4 at 100 | nearest 64 at 100 | first 4 at 200 | nearest 64 at 200 |" in profile_text(profile)


def test_tables_are_aligned_markdown():
    table = markdown(["plan", "n"], [["sink(4) | window(8)", "1"], ["a", "1000"]])
    assert table.splitlines() == [
        "| plan                 |    n |",
        "| -------------------- | ---: |",
        "| sink(4) \\| window(8) |    1 |",
        "| a                    | 1000 |",
    ]
    assert markdown(["a", "b"], []).count("\n") == 1


def test_numbers_as_text():
    assert [percent(share) for share in (None, 0.0, 0.0042, 0.0994, 0.0996, 1.0)] == ["-", "0", "0.4", "9.9", "10", "100"]
    assert with_error(0.8125, 0.0312) == "0.812 ± 0.031"
    assert with_error(0.25, sign=True) == "+0.25"
    assert with_error(None, 0.1) == "-"


def test_results_stand_together_by_task_length_and_metric():
    row = {"variant": "", "items": 4, "plan": "p", "density": 0.1, "value": 0.5, "stderr": 0.1, "dense_value": 0.6}
    rows = [row | {"task": task, "length": n, "metric": "nll"} for n in (2048, 1024) for task in ("needle", "kv")]
    lines = result_table(rows).splitlines()[2:]
    assert [line.split("|")[1:3] for line in lines] == [
        [" kv     ", "   1024 "],
        [" kv     ", "   2048 "],
        [" needle ", "   1024 "],
        [" needle ", "   2048 "],
    ]
    assert lines[0].rstrip(" |").endswith("0.5 ± 0.1 |   0.6 |          -")
