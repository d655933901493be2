"""Tasks of lm-eval: a task of our own from a folder, document by document (skipped where lm-eval is not installed)."""

import json
import random

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from attnsieve import Plan, UserError
from attnsieve.evaluation import evaluate, make_task
from attnsieve.evaluation.tasks import lm_eval_task
from attnsieve.evaluation.tasks.lm_eval_task import _needed, folder_digest, measures, seeded
from attnsieve.evaluation.tokens import encode
from attnsieve.hf import fingerprint
from tests.evaluation_tiny import model, tokenizer

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["x", "yy"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
# Two examples, of numbers that the module draws as RULER's modules do: from the global generator.
EXAMPLES = """
task: tiny_shots
custom_dataset: !function drawn.documents
dataset_path: ""
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{n}} shot"
doc_to_target: "x"
generation_kwargs: {until: ["x"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
DRAWN = """
import random
import datasets

def documents(**_):
    print("making numbers")
    return {split: datasets.Dataset.from_list([{"n": random.random()} for _ in range(5)]) for split in ("train", "test")}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"q": f"abc {n}"}) for n in range(5)))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("DATA", str(data)))
    return tmp_path


def test_a_task_of_our_own_runs_paired(folder):
    task = make_task("lm-eval:tiny_choice", data=folder)
    plans = {"narrow": Plan.uniform(fingerprint(model()), "window(2)")}
    rows = evaluate(model(), tokenizer(), plans, [task], [64], 2, progress=False)
    assert [(row.plan, row.task, row.metric, row.items) for row in rows] == [
        ("dense", "lm-eval:tiny_choice", "acc", 2),
        ("narrow", "lm-eval:tiny_choice", "acc", 2),
    ]
    (item,) = task.items(tokenizer(), 64, 1, 0)
    assert task.ids(tokenizer(), item) == encode(tokenizer(), f"abc {item.place}")
    with pytest.raises(UserError, match="5 documents"):
        task.items(tokenizer(), 64, 6, 0)


def test_rows_of_another_folder_are_not_taken_for_those_of_this_one(folder, tmp_path):
    out = tmp_path / ".rows.jsonl"

    def run():
        task = make_task("lm-eval:tiny_choice", data=folder)
        return evaluate(model(), tokenizer(), {}, [task], [64], 2, out=out, progress=False)[0].variant

    first = run()
    assert len(first) == 8
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "drawn.pyc").write_bytes(b"compiled")
    assert run() == first
    assert len(out.read_text().splitlines()) == 1
    # lm-eval's included files often have no suffix.
    for name in ("data.jsonl", "tiny.yaml", "_tiny_yaml"):
        before = folder_digest(folder)
        with (folder / name).open("a") as file:
            file.write("\n")
        assert folder_digest(folder) != before
    assert run() != first
    assert len(out.read_text().splitlines()) == 2
    assert make_task("lm-eval:tiny_choice").variant == ""


def test_unknown_tasks_are_refused(folder):
    with pytest.raises(UserError, match="cannot make its task 'no_such_task'"):
        make_task("lm-eval:no_such_task", data=folder).items(tokenizer(), 64, 1, 0)


def test_missing_lm_eval_is_named(monkeypatch):
    monkeypatch.setattr(lm_eval_task, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"attnsieve\[eval\]"):
        make_task("lm-eval:niah_single_1")


def test_measures_of_one_document():
    ruler = [{"metrics": ["4096", "8192"], "filter": "none", "4096": -1.0, "8192": 0.5}]
    assert measures(ruler, 8192) == {"string_match": 0.5}
    filtered = [{"metrics": ["acc"], "filter": name, "acc": value} for name, value in (("strict", 0), ("loose", 1))]
    assert measures(filtered, 64) == {"acc,strict": 0.0, "acc,loose": 1.0}
    with pytest.raises(UserError, match="whole corpus"):
        measures([{"metrics": ["bleu"], "filter": "none", "bleu": ("reference", "prediction")}], 64)


def test_runs_share_examples_and_texts_that_lm_eval_draws(folder, monkeypatch, capsys):
    (folder / "shots.yaml").write_text(EXAMPLES)
    (folder / "drawn.py").write_text(DRAWN)
    asked = []
    original = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda self, **call: asked.append(call["input_ids"].tolist()) or original(self, **call)
    )
    plans = {"narrow": Plan.uniform(fingerprint(model()), "window(2)")}
    for seed in range(2):
        random.seed(seed)
        task = make_task("lm-eval:tiny_shots", data=folder)
        evaluate(model(), tokenizer(), plans, [task], [64], 3, progress=False)
    assert asked[:3] == asked[3:6] == asked[6:9] == asked[9:]
    assert tokenizer().decode(asked[0][0]).count("shot") == 3
    assert len(set(map(str, asked))) == 3
    said = capsys.readouterr()
    assert "making numbers" in said.err
    assert "making numbers" not in said.out


def test_global_generators_are_left_as_they_were():
    random.seed(7)
    np.random.seed(7)
    with seeded():
        first = random.random(), np.random.random()
    after = random.random(), np.random.random()
    with seeded():
        assert (random.random(), np.random.random()) == first
    random.seed(7)
    np.random.seed(7)
    assert (random.random(), np.random.random()) == after


def test_texts_beyond_the_model_are_refused_before_lm_eval_cuts_their_beginning(folder, monkeypatch):
    (folder / "shots.yaml").write_text(EXAMPLES + "description: 'Guess. '\n")
    (folder / "drawn.py").write_text(DRAWN)
    task, tokens = make_task("lm-eval:tiny_shots", data=folder), tokenizer()
    (item,) = task.items(tokens, 64, 1, 0)
    text = tokens.decode(task.ids(tokens, item))
    assert text.startswith("Guess. ")
    assert text.count("shot") == 3
    assert task.tokens(tokens, item) == len(task.ids(tokens, item)) + 4
    monkeypatch.setattr(model().config, "max_position_embeddings", task.tokens(tokens, item))
    evaluate(model(), tokens, {}, [task], [64], 1, progress=False)
    monkeypatch.setattr(model().config, "max_position_embeddings", task.tokens(tokens, item) - 1)
    with pytest.raises(UserError, match=r"tiny_shots at length 64 has a text of \d+ tokens"):
        evaluate(model(), tokens, {}, [task], [64], 1, progress=False)


def test_what_a_request_needs():
    Instance = pytest.importorskip("lm_eval.api.instance").Instance

    def needed(kind, *args):
        return _needed(tokenizer(), Instance(request_type=kind, doc={}, arguments=args, idx=0))

    assert needed("loglikelihood", "abc", " de") == 6
    assert needed("loglikelihood_rolling", "abc" * 9000) == 0
    assert needed("generate_until", "abc", {"max_gen_toks": 7}) == 10
    assert needed("generate_until", "abc", {"until": []}) == 259
