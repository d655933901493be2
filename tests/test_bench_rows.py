"""Benchmarks on a CPU: complete rows, the oracle's gate, masks by name, text and plan, time to first token."""

import json
import subprocess
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
from typer.testing import CliRunner

from attnsieve import UserError, attention, environment, selection
from attnsieve.backends import portable
from attnsieve.bench import kernels, ttft
from attnsieve.bench.case import Case
from attnsieve.bench.check import WrongResult
from attnsieve.bench.masks import mask, patterns_of
from attnsieve.bench.rows import Dense, Row, check_target, write
from attnsieve.bench.shapes import SHAPES, shape_of
from attnsieve.bench.suite import Skipped, Suite
from attnsieve.bench.timing import Times
from attnsieve.cli.app import app
from attnsieve.cli.bench import bench
from attnsieve.environment import command
from attnsieve.evaluation.density import pattern_density
from attnsieve.fingerprint import Fingerprint
from attnsieve.hf import fingerprint, load_model
from attnsieve.hf.random_model import CONFIGS
from attnsieve.patterns import Pattern, columns, sink, window
from attnsieve.plan import Plan
from tests.cli_tiny import save_tiny_model
from tests.hf_tiny import MHA, tokens
from tests.interpreter import needs_interpreter
from tests.test_hf_architectures import built

SMALL = Case("sink(2) | window(30)", 150, None, 4, 2, 16, torch.float32, device="cpu", shape="small")
# What every row must have to be repeated and judged.
FIELDS = {
    "op",
    "backend",
    "mask",
    "batch",
    "q_heads",
    "kv_heads",
    "head_dim",
    "q_len",
    "kv_len",
    "dtype",
    "density",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "includes_mask_building",
    "baseline",
    "baseline_ms_p50",
    "speedup",
    "efficiency",
    "error",
    "error_budget",
    "peak_bytes",
    "device",
    "versions",
    "commit",
    "command",
    "date",
}
FAST = {"budget_ms": 1.0}


@pytest.mark.parametrize("measure", [kernels.prefill, kernels.decode, kernels.forward_backward])
def test_rows_are_complete_and_consistent(measure, tmp_path):
    rows = list(measure(SMALL, "portable", Dense("sdpa, dense", 3.0), **FAST))
    write(rows, tmp_path / "new" / "rows.jsonl")
    read = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert len(read) == (1 if measure is kernels.decode else 2)
    assert [row["includes_mask_building"] for row in read] == [False, True][: len(read)]
    for row in read:
        assert row.keys() >= FIELDS
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 < row["error"] <= row["error_budget"]
        assert row["speedup"] == pytest.approx(3.0 / row["ms_p50"], rel=1e-4)
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["density"], rel=1e-4)


@pytest.mark.parametrize("measure", [kernels.prefill, kernels.decode, kernels.forward_backward])
def test_a_single_key_is_measured(measure):
    case = Case.of("dense()", 1, shape_of("smollm2-135m"), torch.float32, "cpu")
    assert next(iter(measure(case, "portable", **FAST))).error < 1e-7


def test_density_is_that_of_the_mask():
    (row, _) = kernels.prefill(SMALL, "portable", **FAST)
    kept = sum(min(i + 1, 30) + min(2, max(0, i - 29)) for i in range(150))
    assert row.density == pytest.approx(kept / (150 * 151 / 2))
    (row,) = kernels.decode(SMALL, "portable", **FAST)
    assert row.density == pytest.approx(32 / 150)


def test_a_decode_step_has_eight_layers_of_their_own_or_as_many_as_have_room():
    assert [kernels._layers(nbytes) for nbytes in (1, 2**30, 2**31, 2**33, 2**34)] == [8, 8, 4, 1, 1]
    call = replace(SMALL, q_len=1).call()
    others = kernels._others(call, 2)
    assert len({layer.k.data_ptr() for layer in (call, *others)} | {layer.v.data_ptr() for layer in (call, *others)}) == 6
    outputs = [kernels.run_backend(layer, "portable")[0] for layer in (call, *others)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert Times(2.0, 4.0, 8.0).each(4) == Times(0.5, 1.0, 2.0)


@pytest.mark.parametrize("wrong", ["out", "lse", "nan"])
def test_a_wrong_kernel_gives_no_row(wrong, monkeypatch):
    right = portable.run

    def run(call):
        out, lse = right(call)
        return {"out": (out * 1.001, lse), "lse": (out, lse + 0.01), "nan": (out * torch.nan, lse)}[wrong]

    monkeypatch.setattr(portable, "run", run)
    for measure in (kernels.prefill, kernels.decode):
        with pytest.raises(WrongResult):
            next(iter(measure(SMALL, "portable", **FAST)))


def test_wrong_gradients_give_no_row(monkeypatch):
    right = portable.run

    def run(call):
        out, lse = right(call)
        return out + 0.01 * (call.q.sum() - call.q.sum().detach()), lse

    monkeypatch.setattr(portable, "run", run)
    with pytest.raises(WrongResult, match="dq"):
        next(iter(kernels.forward_backward(SMALL, "portable", **FAST)))


def test_the_command_writes_rows_and_stops_at_a_wrong_one(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = [
        "bench",
        "prefill",
        "--masks",
        "window(20);sink(1) | columns(5)",
        "--shapes",
        "smollm2-135m",
        "--lengths",
        "96",
    ]
    arguments += ["--backends", "portable,reference", "--device", "cpu", "--budget-ms", "1", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(row["backend"], row["includes_mask_building"]) for row in rows] == [("sdpa", False)] + [
        ("portable", False),
        ("portable", True),
        ("reference", False),
        ("reference", True),
    ] * 2
    assert len(out.read_text().splitlines()) == len(rows)
    assert all(row["baseline"] == "sdpa, dense" for row in rows[1:])

    right = portable.run
    monkeypatch.setattr(portable, "run", lambda call: (right(call)[0] * 1.01, right(call)[1]))
    out.unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "wrong result, no row" in done.stderr
    assert "portable" not in out.read_text(), "the dense row is right and stays, the wrong one must not be there"


def test_what_cannot_be_served_is_skipped_by_name():
    suite = Suite("prefill", ["window(9)"], [shape_of("smollm2-135m")], [64], ["triton", "fa4"], [], torch.float64, "cpu")
    rows = list(suite.rows())
    assert all(isinstance(row, Skipped) for row in rows)
    assert [row.backend for row in rows] == ["triton", "fa4"]
    assert "CUDA" in rows[1].reason


def test_where_flex_attention_fails_the_rest_is_still_measured(monkeypatch):
    def attend(_call, kernel):
        raise NotImplementedError(f"no code for {kernel}") if kernel == "FLASH" else WrongResult("far off")

    monkeypatch.setattr(kernels.flex, "attend", attend)
    suite = Suite(
        "prefill", ["window(9)"], [shape_of("smollm2-135m")], [64], ["flex-flash", "portable"], [], torch.float32, "cpu"
    )
    skipped, *rows = suite.rows()
    assert str(skipped) == "skipped flex-flash window(9) at 64: NotImplementedError: no code for FLASH"
    assert [row.backend for row in rows] == ["portable"] * 2
    with pytest.raises(WrongResult, match="far off"):
        list(replace(suite, backends=["flex-triton"]).rows())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op": "sing"}, "unknown operation"),
        ({"backends": ["cuda"]}, "unknown backend"),
        ({"baselines": ["fast"]}, "unknown baseline"),
        ({"masks": ["window(9)", "nonsense"]}, "unknown mask 'nonsense'"),
        ({"masks": ["blocks-11+"]}, "unknown mask 'blocks-11'"),
        ({"masks": ["windw(9)"]}, "did you mean window"),
        ({"masks": ["nowhere:0"]}, "nowhere"),
    ],
)
def test_bad_suites_are_refused_before_anything_is_measured(change, named):
    suite = Suite("prefill", ["window(9)"], [shape_of("smollm2-135m")], [64], ["portable"], ["sdpa"], torch.float32, "cpu")
    with pytest.raises(UserError, match=named):
        next(replace(suite, **change).rows())


def test_whole_models_refuse_unknown_masks_before_anything_is_measured():
    with pytest.raises(UserError, match="unknown mask 'nonsense'"):
        next(ttft.rows(ttft.Setting("tiny", [32], ["window(9)", "nonsense"], dtype=torch.float32, device="cpu")))


def test_the_help_says_which_shapes_there_are_whole_models_of():
    told = get_type_hints(bench, include_extras=True)["shapes"].__metadata__[0].help
    both, kernels_alone = (
        set(names.split(", ")) for names in told.split("; for ttft also real")[0].split("; except for ttft also ")
    )
    assert both == SHAPES.keys() & CONFIGS.keys()
    assert kernels_alone == SHAPES.keys() - CONFIGS.keys()


def test_masks_by_text_and_from_plans(tmp_path):
    mark = Fingerprint("llama", 2, 4, 2, 16, "0" * 16)
    rule, other = sink(1) | window(4), Pattern.of(*columns(3)) | window(2)
    Plan(mark, ((rule,) * 4, (rule, other) * 2)).save_pretrained(tmp_path / "plan")
    assert patterns_of(f"{tmp_path}/plan:1", 4) == (rule, other, rule, other)
    assert patterns_of(str(rule), 3) == (rule,) * 3
    assert mask(f"{tmp_path}/plan:0", 20, 4, "cpu").heads == 4
    with pytest.raises(UserError, match="4 heads, the shape 9"):
        patterns_of(f"{tmp_path}/plan:0", 9)
    with pytest.raises(UserError, match="unknown mask 'blocks-11'"):
        mask("blocks-11", 20, 4, "cpu")


def test_shapes_group_their_heads_evenly():
    assert all(shape.q_heads % shape.kv_heads == 0 for shape in SHAPES.values())


def test_selection_is_measured():
    (row,) = kernels.select(replace(SMALL, mask="dma-512", n=700, shared=True, bias=True), **FAST)
    assert row.op == "select"
    assert row.includes_mask_building
    (row,) = kernels.select(replace(SMALL, mask="top_blocks(1, block=16)"), **FAST)
    assert 0 < row.density < 1
    with pytest.raises(UserError, match="chooses nothing"):
        list(kernels.select(SMALL, **FAST))


def test_what_chooses_from_the_input_is_measured_with_and_without_choosing(monkeypatch):
    case = replace(SMALL, mask="sink(2) | window(9) | probed_keys(mass=0.5)")
    counted, choose = [], selection.choose

    def counting(*arguments, **options):
        counted.append(choose(*arguments, **options))
        return counted[-1]

    monkeypatch.setattr(selection, "choose", counting)
    rows = kernels.prefill(case, "portable", **FAST)
    given, before = next(rows), len(counted)
    built = next(rows)
    assert (given.includes_mask_building, built.includes_mask_building) == (False, True)
    assert before == 1, "chosen once for attention alone"
    assert len(counted) > 3, "and in every repeat"
    assert given.density == kernels.density(counted[0], 150, 150)
    assert 0 < given.density < 1
    assert given.error <= given.error_budget
    (step,) = kernels.decode(case, "portable", **FAST)
    assert (step.q_len, step.kv_len) == (1, 150)
    for change in ({"batch": 2}, {"shared": True}):
        with pytest.raises(UserError, match="batch of 1, without"):
            next(kernels.prefill(replace(case, **change), "portable", **FAST))


@needs_interpreter
@pytest.mark.parametrize("mask", ["top_blocks(1, block=16)", "window(20)"])
def test_building_is_measured_for_chosen_and_static_layouts(mask):
    (row,) = kernels.layout(replace(SMALL, mask=mask), "triton", **FAST)
    assert row.op == "layout"
    assert 0 < row.density < 1


def test_rows_are_added_to_files_that_others_have_edited(tmp_path):
    (row, _) = kernels.prefill(SMALL, "portable", **FAST)
    out = tmp_path / "rows.jsonl"
    write([row], out)
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes().rstrip())
    check_target(out)
    write([row], out)
    assert len({json.loads(line)["mask"] for line in out.read_text("utf-8-sig").splitlines()}) == 1
    out.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        check_target(out)


def test_time_to_first_token_of_a_tiny_model():
    setting = ttft.Setting("tiny", [96, 160], ["sink(2) | window(16)"], ["auto"], ["sdpa", "eager"], 2, torch.float32, "cpu")
    rows = list(ttft.rows(setting))
    assert [(row.backend, row.kv_len, row.includes_mask_building) for row in rows] == [
        (backend, n, building) for n in (96, 160) for backend in ("sdpa", "eager", "auto") for building in (True, False)
    ]
    assert all(row.ms_p50 > 0 and row.batch == 2 for row in rows)
    assert all(row.error <= row.error_budget and row.efficiency is None for row in rows if row.backend == "auto")
    for n in (96, 160):
        dense = min(row.ms_p50 for row in rows if row.kv_len == n and row.mask == "dense()" and not row.includes_mask_building)
        assert all(row.baseline_ms_p50 == dense for row in rows if row.kv_len == n and row.backend == "auto")


def test_time_to_first_token_of_a_real_model_by_its_plan(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    mark = fingerprint(load_model(folder)[0])
    dynamic = Pattern.parse("sink(1) | window(8) | probed_keys(mass=0.6)")
    Plan(mark, ((window(24),) * 4, (dynamic, window(9)) * 2)).save_pretrained(tmp_path / "plan")
    masks = [str(tmp_path / "plan"), "window(24)"]
    setting = ttft.Setting(str(folder), [130], masks, dtype=torch.float32, device="cpu")
    dense, _, planned, again, given, _ = ttft.rows(setting)
    assert (dense.mask, planned.mask, given.mask, given.shape) == ("dense()", "plan", "window(24)", "model")
    assert planned.includes_mask_building
    assert not again.includes_mask_building
    assert given.density == pattern_density(window(24), 130)
    # Half of the plan is that window, a quarter a narrower one.
    assert given.density / 2 < planned.density < 1
    assert planned.error <= planned.error_budget

    other = fingerprint(load_model(save_tiny_model(tmp_path / "deeper", layers=3))[0])
    Plan(other, ((window(24),) * 4,) * 3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="made for another model"):
        next(ttft.rows(replace(setting, masks=[str(tmp_path / "other")])))
    with pytest.raises(UserError, match="513 tokens are more than the model's 512 positions"):
        next(ttft.rows(replace(setting, lengths=[130, 513])))
    with pytest.raises(UserError, match="all its layers"):
        next(ttft.rows(replace(setting, layers=1)))


def test_running_out_of_memory_is_a_row_that_says_so(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ttft, "_first_token", full)
    (row,) = ttft.rows(ttft.Setting("tiny", [32], [], dense=["eager"], dtype=torch.float32, device="cpu"))
    assert row.failure == "out of memory"
    assert row.ms_p50 is None
    assert "out of memory" in str(row)


def test_time_to_first_token_is_of_the_density_that_ran(monkeypatch):
    """Llama 4 restricts its first layer by a rule of its own; "fastest" runs layers dense whose costs say so."""
    changes = {"attention_chunk_size": 16, "intermediate_size_mlp": 8, "num_local_experts": 2}
    network = built("Llama4TextConfig", **MHA, **changes, layer_types=["chunked_attention", "full_attention"])
    monkeypatch.setattr(ttft, "_subject", lambda _: ttft._Subject(network, lambda n: tokens(1, n)))
    monkeypatch.setattr("attnsieve.hf.sparse_layer.dense_is_faster", lambda *_: True)
    setting = ttft.Setting("tiny", [40], ["window(8)"], ["auto", "fastest"], dtype=torch.float32, device="cpu")
    sparse, fastest = ([row for row in ttft.rows(setting) if row.backend == backend] for backend in ("auto", "fastest"))
    assert {row.density for row in sparse} == {(1 + pattern_density(window(8), 40)) / 2}
    assert {row.density for row in fastest} == {1.0}


def test_time_to_first_token_of_a_model_that_caps_its_scores(monkeypatch):
    network = built("Gemma2Config", **MHA)
    monkeypatch.setattr(ttft, "_subject", lambda _: ttft._Subject(network, lambda n: tokens(1, n)))
    setting = ttft.Setting("tiny", [40], ["window(8)"], dense=["sdpa"], dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match="Gemma2ForCausalLM does not run as sdpa: take eager as its baseline"):
        next(ttft.rows(setting))
    assert {row.density for row in ttft.rows(replace(setting, dense=["eager"]))} == {1.0}


def test_a_density_that_memory_is_too_small_for_is_unknown(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rule = "window(4) | probed_keys(mass=0.6)"
    setting = ttft.Setting("tiny", [32], [rule], dtype=torch.float32, device="cpu")
    monkeypatch.setattr("attnsieve.evaluation.fidelity.layer_fidelity", full)
    first, later = (row for row in ttft.rows(setting) if row.mask == rule)
    assert first.density is later.density is None
    assert later.ms_p50 > 0
    assert "density unknown" in str(later)
    monkeypatch.setattr(ttft, "check_rows", full)
    (row,) = (row for row in ttft.rows(setting) if row.mask == rule)
    assert row.failure == "out of memory"


def test_commands_do_not_name_folders_of_the_machine():
    assert command(["/home/me/bin/attnsieve", "bench", "--out", "/tmp/x/rows.jsonl"]) == "attnsieve bench --out rows.jsonl"
    assert command(["/x/attnsieve/__main__.py", "--masks", "sink(1) | window(2)"]) == (
        "python -m attnsieve --masks 'sink(1) | window(2)'"
    )


def test_the_commit_is_that_of_the_package_not_of_a_checkout_around_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init"], ["commit", "--allow-empty", "--message", "theirs"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    (tmp_path / "environment.py").write_text("")
    assert environment.commit() is None
    for arguments in (["add", "."], ["commit", "--message", "ours"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    ours = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert environment.commit() == ours[:12]


def test_a_row_without_a_baseline_claims_no_speed_up():
    row = next(iter(kernels.prefill(SMALL, "portable", **FAST)))
    assert isinstance(row, Row)
    assert row.speedup is None
    assert row.efficiency is None


def test_auto_is_named_with_what_it_chose():
    row = next(iter(kernels.prefill(SMALL, "auto", **FAST)))
    assert row.backend in {f"auto: {name}" for name in attention.BACKENDS}
    assert row.work == next(iter(kernels.prefill(SMALL, row.backend.removeprefix("auto: "), **FAST))).work is not None


def test_masks_of_more_keys_than_there_are_say_so():
    with pytest.raises(UserError, match="keeps 1000 keys of every head: use a longer length than 64"):
        mask("C", 64, 2, "cpu")
