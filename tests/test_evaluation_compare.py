"""evaluate on a tiny model: pairing, rows, resuming; fidelity against written-out attention."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch

from attnsieve import Pattern, Plan, UserError
from attnsieve.evaluation import compare, evaluate, layer_fidelity, make_task, read_rows
from attnsieve.evaluation.compare import Runs
from attnsieve.evaluation.density import pattern_density
from attnsieve.evaluation.ledger import Cell, plan_digest
from attnsieve.evaluation.rows import Row, append_rows
from attnsieve.evaluation.scoring import log_probs_at, spread
from attnsieve.evaluation.tasks import Item, Query, QuestionTask
from attnsieve.evaluation.tasks.questions import forced_answers
from attnsieve.hf import apply, fingerprint, measure
from attnsieve.hf.loading import load_model
from tests.evaluation_tiny import model, plan_density, tokenizer
from tests.hf_tiny import MHA
from tests.test_hf_architectures import built

FIELDS = (
    "model plan density task variant length items metric value stderr dense_value paired_difference paired_stderr device "
    "versions commit command date"
)


def plan(text: str) -> Plan:
    return Plan.uniform(fingerprint(model()), text)


def short_kv() -> QuestionTask:
    def build(random, units):
        document = "".join(f"{random.randint(10, 99)}: {random.randint(10, 99)}\n" for _ in range(units))
        return Item((Query(document + "11: ", ("42",)), Query(document + "12: ", ("17",))))

    return QuestionTask("short", build)


def run(plans, tasks=None, lengths=(120,), items=3, **more):
    return evaluate(model(), tokenizer(), plans, tasks or [short_kv()], lengths, items, progress=False, **more)


def test_rows_carry_the_schema_and_json_reads_them(tmp_path):
    out = tmp_path / "results" / "eval.jsonl"
    rows = run({"narrow": plan("window(8)")}, out=out)
    assert set(FIELDS.split()) <= {field.name for field in fields(Row)}
    assert [json.loads(line)["plan"] for line in out.read_text().splitlines()] == ["dense"] * 3 + ["narrow"] * 3
    assert read_rows(out) == rows
    dense = {row.metric: row for row in rows if row.plan == "dense"}
    for row in rows[3:]:
        assert row.dense_value == dense[row.metric].value
        assert row.paired_difference == pytest.approx(row.value - row.dense_value)
        assert row.density == pytest.approx(pattern_density(Pattern.parse("window(8)"), 120))
        assert (row.task, row.length, row.items, row.seed, row.dtype) == ("short", 120, 3, 0, "float64")
        assert row.versions["torch"] == torch.__version__.partition("+")[0] or row.versions["torch"] == torch.__version__
    assert dense["answer_nll"].dense_value is None
    assert dense["answer_nll"].density == 1.0


def test_rows_of_other_weights_are_not_taken_for_those_of_this_model(tmp_path):
    out = tmp_path / "rows.jsonl"
    first = run({}, out=out)
    other = copy.deepcopy(model())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match="holds rows of a model 'llama' with other weights"):
        evaluate(other, tokenizer(), {}, [short_kv()], [120], 3, out=out, progress=False)
    # Rows of before weights were noted.
    old = [replace(row, versions={"torch": "2.0"}) for row in first]
    out.unlink()
    append_rows(out, old)
    assert evaluate(other, tokenizer(), {}, [short_kv()], [120], 3, out=out, progress=False) == old


def test_values_are_those_of_the_items():
    task = short_kv()
    items = task.items(tokenizer(), 120, 3, 7)
    with apply(model(), plan("window(8)")):
        sparse = [seen.measures["answer_nll"] for seen in forced_answers(model(), tokenizer(), items)]
    whole = [seen.measures["answer_nll"] for seen in forced_answers(model(), tokenizer(), items)]
    (row,) = [row for row in run({"narrow": plan("window(8)")}, seed=7) if row.plan == "narrow" and row.metric == "answer_nll"]
    assert row.value == pytest.approx(sum(sparse) / 3)
    assert row.dense_value == pytest.approx(sum(whole) / 3)
    differences = torch.tensor(sparse) - torch.tensor(whole)
    assert row.paired_stderr == pytest.approx(float(differences.std() / 3**0.5), rel=1e-4)
    assert abs(row.paired_difference) > 1e-3


def test_dense_attention_runs_once_for_neighbouring_plans(tmp_path, monkeypatch):
    task = short_kv()
    runs, cell = Runs(model(), tokenizer(), tmp_path / "rows.jsonl", progress=False), Cell(task, 120, 3, 0)
    first = runs.cell(cell, {"a": plan("window(8)")})
    made = []
    monkeypatch.setattr(QuestionTask, "items", lambda *_: made.append(1))
    both = runs.cell(cell, {"a": plan("window(8)"), "b": plan("window(9)")})
    assert both[: len(first)] == first
    assert not made
    kl = {row.plan: row.value for row in both if row.metric == "answer_kl"}
    assert kl["dense"] == 0 < min(kl["a"], kl["b"])


def test_a_plan_that_keeps_everything_changes_nothing():
    for text in ("dense()", "window(4096)"):
        for row in run({"all": plan(text)}):
            if row.plan == "all":
                assert row.paired_difference == pytest.approx(0, abs=1e-5)
                assert row.density == 1


def test_done_runs_are_not_repeated(tmp_path, monkeypatch):
    out = tmp_path / "eval.jsonl"
    first = run({"a": plan("window(8)")}, out=out)
    watched = QuestionTask("short", short_kv().build)
    monkeypatch.setattr(QuestionTask, "observe_all", lambda *_: pytest.fail("ran again"))
    assert run({"a": plan("window(8)")}, [watched], out=out) == first
    monkeypatch.undo()
    again = run({"a": plan("window(8)"), "b": plan("sink(2) | window(8)")}, out=out)
    assert again[: len(first)] == first
    assert len(read_rows(out)) == 9
    # Another plan of the same name, seed, length or number of items is another run.
    run({"a": plan("window(9)")}, out=out)
    run({"a": plan("window(8)")}, out=out, seed=1)
    run({"a": plan("window(8)")}, out=out, items=2)
    run({"a": plan("window(8)")}, out=out, lengths=(121,))
    assert len(read_rows(out)) == 9 + 3 + 3 * 6


def test_a_torn_file_is_refused_by_line(tmp_path):
    out = tmp_path / "eval.jsonl"
    run({}, out=out)
    out.write_text(out.read_text()[:-20])
    with pytest.raises(UserError, match="line 3"):
        run({}, out=out)
    out.write_text('{"op": "prefill"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_rows(out)


EDITED = {"value": "0.5", "density": None, "length": 12.0, "items": True, "stderr": float("nan"), "plan": 5, "versions": []}


@pytest.mark.parametrize(("field", "value"), [*EDITED.items(), ("value", 10**400), ("value", float("inf"))])
def test_rows_with_fields_of_another_type_are_refused_by_line(field, value, tmp_path):
    out = tmp_path / "eval.jsonl"
    run({}, out=out)
    first, rest = out.read_text().split("\n", 1)
    out.write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + rest)
    with pytest.raises(UserError, match="line 1 is not an evaluation row"):
        read_rows(out)


def test_nan_never_becomes_a_row(tmp_path):
    (row, *_) = run({})
    broken = Row(**{**{field.name: getattr(row, field.name) for field in fields(Row)}, "value": float("nan")})
    with pytest.raises(UserError, match="NaN"):
        append_rows(tmp_path / "x.jsonl", [broken])
    assert not (tmp_path / "x.jsonl").exists()


def test_rows_are_added_after_a_last_line_without_an_end(tmp_path):
    out = tmp_path / "eval.jsonl"
    rows = [replace(row, command="one\u2028two") for row in run({})]
    append_rows(out, rows[:1])
    out.write_text(out.read_text().rstrip())
    append_rows(out, rows[1:])
    assert read_rows(out) == rows


def test_bad_requests():
    with pytest.raises(UserError, match="rename"):
        run({"dense": plan("window(8)")})
    with pytest.raises(UserError, match="positive"):
        run({}, items=0)
    training = copy.deepcopy(model()).train()
    with pytest.raises(UserError, match="eval"):
        evaluate(training, tokenizer(), {}, [short_kv()], [100], 1, progress=False)


def test_a_plan_of_another_model_is_refused_before_dense_attention_runs(monkeypatch):
    monkeypatch.setattr(Runs, "cell", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UserError, match="another model"):
        run({"own": plan("window(8)"), "other": Plan.uniform(fingerprint(model(layers=1)), "window(8)")})


def test_the_models_fingerprint_is_taken_once_for_all_plans_and_not_without_any(monkeypatch):
    taken = []
    monkeypatch.setattr(Runs, "cell", lambda *_: [])
    monkeypatch.setattr(compare, "fingerprint", lambda network: taken.append(network) or fingerprint(network))
    run({})
    assert not taken
    run({"a": plan("window(8)"), "b": plan("window(9)")})
    assert taken == [model()]


def test_the_model_is_left_as_it_was():
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        before = model()(ids).logits
        run({"a": plan("window(8)")})
        assert torch.equal(model()(ids).logits, before)


def test_texts_beyond_the_models_positions_are_refused():
    with pytest.raises(UserError, match="4097 tokens are more than the model's 4096 positions"):
        run({}, lengths=(120, 4097))
    with pytest.raises(UserError, match="4097 tokens are more than the model's 4096 positions"):
        layer_fidelity(model(), plan("window(5)"), [5] * 4097)


def test_fidelity_rows():
    task = make_task("fidelity")
    rows = run({"all": plan("window(999)"), "narrow": plan("window(4)")}, [task], lengths=(60,), items=2)
    values = {(row.plan, row.metric): row.value for row in rows}
    assert {metric for _, metric in values} == {"kl", "top1_agreement", "retained_mass", "output_error"}
    assert values["dense", "kl"] == 0
    assert values["dense", "retained_mass"] == 1
    assert values["all", "kl"] == pytest.approx(0, abs=1e-6)
    assert values["all", "retained_mass"] == pytest.approx(1)
    assert values["narrow", "kl"] > 0.01
    assert values["narrow", "retained_mass"] < 0.9
    assert all(row.variant == "synthetic" for row in rows)
    item = task.items(tokenizer(), 60, 2, 0)[0]
    positions = spread(60, 256)
    with apply(model(), plan("window(4)")):
        sparse = log_probs_at(model(), item, positions)
    whole = log_probs_at(model(), item, positions)
    kl = torch.nn.functional.kl_div(sparse, whole, log_target=True, reduction="batchmean")
    assert task.measure(sparse, whole)["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_perplexity_rows_by_position():
    rows = run({"narrow": plan("window(4)")}, [make_task("perplexity")], lengths=(600,), items=2)
    dense = {row.metric: row.value for row in rows if row.plan == "dense"}
    assert set(dense) == {"nll", "nll 0-256", "nll 256-512", "nll 512-600"}
    parts = dense["nll 0-256"] * 255 + dense["nll 256-512"] * 256 + dense["nll 512-600"] * 88
    assert dense["nll"] == pytest.approx(parts / 599, rel=1e-5)


def written_out(text: str, ids: list[int]):
    """Mass and output of every head, from eager attention's own matrices."""
    network = copy.deepcopy(model())
    network.set_attn_implementation("eager")
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out)) for layer in network.model.layers
    ]
    with torch.no_grad():
        maps = network(torch.tensor([ids]), output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    rows = torch.arange(len(ids))
    keep = Pattern.parse(text).keep(rows[:, None], rows[None, :])
    for p, v in zip(maps, values, strict=True):
        heads = v[0].view(len(ids), 2, -1).transpose(0, 1).repeat_interleave(2, 0)
        mass = (p[0] * keep).sum(-1)
        kept = (p[0] * keep) @ heads / mass[..., None].clamp_min(1e-300)
        full = p[0] @ heads
        yield mass.mean(-1), (kept - full).norm(dim=(1, 2)) / full.norm(dim=(1, 2))


@pytest.mark.parametrize("text", ["window(5)", "sink(2) | window(3)", "dense()", "diagonals(0, 3, 9)"])
def test_layer_fidelity_equals_written_out_attention(text):
    ids = [2 + 7 * place % 200 for place in range(70)]
    found = layer_fidelity(model(), plan(text), ids)
    for layer, (mass, error) in enumerate(written_out(text, ids)):
        assert torch.allclose(found.retained[layer], mass.double(), atol=1e-6)
        assert torch.allclose(found.error[layer], error.double(), atol=1e-6)
    assert found.density.mean() == pytest.approx(pattern_density(Pattern.parse(text), 70))


def test_layer_fidelity_of_mixed_and_empty_rows():
    base = plan("window(5)")
    rows = [list(row) for row in base.patterns]
    rows[0][1] = Pattern.parse("columns(3)")  # rows 0 to 2 keep nothing: mass 0, output 0
    mixed = Plan(base.fingerprint, tuple(map(tuple, rows)))
    ids = [2 + 7 * place % 200 for place in range(40)]
    found = layer_fidelity(model(), mixed, ids)
    (mass, _), _ = written_out("columns(3)", ids)
    assert found.retained[0, 1] == pytest.approx(float(mass[1]))
    assert found.error.isfinite().all()
    same = layer_fidelity(model(), base, ids)
    assert torch.equal(found.retained[0, 0], same.retained[0, 0])
    assert torch.equal(found.retained[1], same.retained[1])


def test_layer_fidelity_of_a_model_in_training_mode_is_that_without_dropout():
    ids, cut, training = list(range(2, 60)), plan("window(5)"), copy.deepcopy(model())
    for module in training.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    found = layer_fidelity(training.train(), cut, ids)
    assert torch.equal(found.error, layer_fidelity(model(), cut, ids).error)
    assert all(module.training for module in training.modules())


def test_layer_fidelity_of_the_last_rows():
    ids, cut = list(range(2, 90)), plan("sink(1) | window(8)")
    whole, last = layer_fidelity(model(), cut, ids), layer_fidelity(model(), cut, ids, last=1)
    earlier = layer_fidelity(model(), cut, ids[:-1])
    assert torch.equal(whole.density, last.density)
    assert torch.allclose(88 * whole.retained, 87 * earlier.retained + last.retained, atol=1e-6)
    assert not torch.allclose(whole.error, last.error)
    with pytest.raises(UserError, match="from 1 to the text's 88"):
        layer_fidelity(model(), cut, ids, last=89)


@pytest.mark.parametrize("text", ["sink(1) | window(4)", "vertical_slash(mass=0.5, probe=8, strided=0)"])
def test_a_measurement_of_one_text_is_its_fidelity(text):
    ids = torch.arange(2, 72)
    measured = measure(model(), [ids[None]], [text], progress=False)
    found = layer_fidelity(model(), plan(text), ids.tolist())
    assert torch.equal(measured.density[0, 0], found.density.float())
    assert torch.equal(measured.retained[0, 0], found.retained.float())
    exact = layer_fidelity(model(), plan(text), ids.tolist(), backend="reference")
    assert torch.allclose(exact.retained, found.retained, atol=1e-6)
    # Of a measurement a head's error is over the output of all heads.
    assert ((found.error.square() > measured.error[0, 0]) & (measured.error[0, 0] > 0)).all()


def test_dynamic_plans_report_a_measured_density():
    rows = run({"chosen": plan("vertical_slash(mass=0.5, probe=8, strided=0)")})
    (density,) = {row.density for row in rows if row.plan == "chosen"}
    assert 0 < density < 1


def test_layers_that_stay_dense_count_as_dense():
    """Llama 4 restricts its first layer by a rule of its own."""
    changes = {"vocab_size": len(tokenizer()), "attention_chunk_size": 16, "intermediate_size_mlp": 8, "num_local_experts": 2}
    network = built("Llama4TextConfig", **MHA, **changes, layer_types=["chunked_attention", "full_attention"])
    chosen = Plan.uniform(fingerprint(network), "window(8)")
    rows = evaluate(network, tokenizer(), {"sparse": chosen}, [make_task("kv")], [120], 1)
    (density,) = {row.density for row in rows if row.plan == "sparse"}
    assert density == pytest.approx((1 + pattern_density(Pattern.parse("window(8)"), 120)) / 2, abs=0.03)


def test_a_plan_under_which_nothing_runs_sparse_is_refused_in_a_sentence():
    network = built("Gemma2Config", **MHA, vocab_size=len(tokenizer()))
    chosen = Plan.uniform(fingerprint(network), "window(8)")
    with pytest.raises(UserError, match=r"^[^\n]*nothing ran sparse \(softcap: [\w ]+\): leave it out, or give one[^\n]*$"):
        evaluate(network, tokenizer(), {"sparse": chosen}, [make_task("kv")], [120], 1)


def test_density_of_layers_with_windows_is_that_inside_them():
    network = built("MistralConfig", **MHA, vocab_size=len(tokenizer()), sliding_window=16)
    chosen = Plan.uniform(fingerprint(network), "sink(2) | window(30)")
    rows = evaluate(network, tokenizer(), {"sparse": chosen}, [make_task("kv")], [120], 1)
    (density,) = {row.density for row in rows if row.plan == "sparse"}
    assert density == pytest.approx(pattern_density(Pattern.parse("window(16)"), 120))


def test_density_is_counted_over_all_heads():
    base = plan("window(5)")
    rows = [list(row) for row in base.patterns]
    rows[1][3] = Pattern.parse("dense()")
    mixed = Plan(base.fingerprint, tuple(map(tuple, rows)))
    narrow = pattern_density(Pattern.parse("window(5)"), 50)
    assert narrow == pytest.approx((5 * 50 - 10) / (50 * 51 / 2))
    assert plan_density(mixed, 50) == pytest.approx((7 * narrow + 1) / 8)


def test_digests_name_the_rule_not_its_origin():
    assert plan_digest(plan("window(5)")) == plan_digest(Plan(fingerprint(model()), plan("window(5)").patterns, {"x": 1}))
    assert plan_digest(plan("window(5)")) != plan_digest(plan("window(6)"))


@pytest.mark.model
def test_a_narrow_window_loses_the_keys_of_a_real_model():
    network, tokens = load_model("smollm2-135m")
    narrow = Plan.uniform(fingerprint(network), "sink(4) | window(64)")
    rows = evaluate(network, tokens, {"narrow": narrow}, [make_task("kv")], [384], 1, progress=False)
    found = {(row.plan, row.metric): row for row in rows}
    assert found["dense", "answer_nll"].model == "smollm2-135m"
    assert found["dense", "exact_match"].value >= 0.25
    assert found["narrow", "answer_nll"].paired_difference > 0.3
