"""The commands on a tiny model: what they write, and what a program reads on stdout."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaForCausalLM

import attnsieve as package
from attnsieve.cli.demo import next_steps
from attnsieve.cli.fit import named_values
from attnsieve.cli.measure import text_reader
from attnsieve.cli.options import lengths_of
from attnsieve.cli.run import check_room, read_prompt
from attnsieve.errors import UserError
from attnsieve.evaluation.text import text_source
from attnsieve.hf import longest_text
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile
from tests.cli_tiny import attnsieve, make_folder, refused
from tests.evaluation_tiny import tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli"))


def test_profile_and_fit_write_what_the_library_reads(work):
    profile, plan = Profile.from_pretrained(work / "profile"), Plan.from_pretrained(work / "plan")
    assert (profile.pcl, profile.long[0].length, int(profile.rows_seen[-1])) == (16, 32, 3)
    assert profile.provenance["data"] == [str(work / "text.txt")]
    assert plan.provenance["preset"] == "paper"
    assert plan.provenance["settings"]["tau"] == 0.35


def test_fit_passes_settings_on(work, tmp_path):
    done = attnsieve(
        "fit", work / "profile", "--preset", "paper", "--set", "min_support=4", "--mu", "4/5", "--out", tmp_path / "p", "--json"
    )
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed["out"] == str(tmp_path / "p")
    assert printed["provenance"]["settings"] | {"min_support": 4, "mu": "4/5"} == printed["provenance"]["settings"]


def test_fit_takes_several_profiles(work, tmp_path):
    arguments = ["--set", "local=false", "--set", "floor=0", "--out", tmp_path / "p", "--json"]
    done = attnsieve("fit", work / "profile", work / "profile", *arguments)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["provenance"]["profiles"]) == 2


def test_fit_leaves_the_first_layers_dense(work, tmp_path):
    done = attnsieve("fit", work / "profile", "--preset", "paper", "--dense-layers", 1, "--out", tmp_path / "p")
    assert done.exit_code == 0, done.output
    first, second = Plan.from_pretrained(tmp_path / "p").patterns
    assert {str(pattern) for pattern in first} == {"dense()"}
    assert "dense()" not in {str(pattern) for pattern in second}
    assert "choose by a preset" in refused("fit", work / "profile", "--last-rows", 64, "--tau", 0.3, "--out", tmp_path / "x")


def test_measure_and_fit_within_a_budget(work, tmp_path):
    candidates = ["--candidates", "sink(1) | window(8)", "--candidates", 'window(4) | top_blocks(1, block=8, share="kv")']
    arguments = ["--data", work / "text.txt", "--lengths", "64,128", *candidates, "--out", tmp_path / "measured"]
    done = attnsieve("measure", work / "model", *arguments, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["candidates"] == [
        "sink(1) | window(8)",
        'top_blocks(1, block=8, share="kv") | window(4)',
        "dense()",
    ]
    assert Measurement.from_pretrained(tmp_path / "measured").lengths == (64, 128)
    assert "--out DIRECTORY draws measurements" in refused("show", tmp_path / "measured", "--html", tmp_path / "page.html")
    done = attnsieve("fit", tmp_path / "measured", "--density", 0.5, "--share", "kv", "--out", tmp_path / "plan")
    assert done.exit_code == 0, done.output
    plan = Plan.from_pretrained(tmp_path / "plan")
    assert plan.provenance["budget"] == {"density": 0.5}
    assert float(plan.density.mean()) <= 0.5
    guards = ["--share", "kv", "--last-rows", 8, "--dense-decode", "--out", tmp_path / "guarded"]
    done = attnsieve("fit", tmp_path / "measured", tmp_path / "measured", "--density", 1, *guards)
    assert done.exit_code == 0, done.output
    about = Plan.from_pretrained(tmp_path / "guarded").provenance
    assert about["guards"] == {"dense_layers": 0, "last_rows": 8, "dense_decode": True}
    assert len(about["measurement"]["worst_of"]) == 2
    assert "the least they reach is" in refused(
        "fit", tmp_path / "measured", "--density", 0.01, "--share", "kv", "--out", tmp_path / "x"
    )
    assert "give a budget" in refused("fit", tmp_path / "measured", "--out", tmp_path / "x")
    both = refused("fit", tmp_path / "measured", "--mass", 0.9, "--tau", 0.1, "--out", tmp_path / "x")
    assert "tau: choose by a preset" in both


def test_measure_takes_the_documents_of_tasks(work, tmp_path):
    arguments = ["--data", work / "text.txt", "--tasks", "kv", "--lengths", "256", "--candidates", "window(8)"]
    done = attnsieve("measure", work / "model", *arguments, "--documents", 1, "--out", tmp_path / "m")
    assert done.exit_code == 0, done.output
    found = Measurement.from_pretrained(tmp_path / "m")
    assert found.provenance["documents"] == [2]
    assert 200 < found.lengths[0] <= 256


def test_measure_by_a_question_and_its_answer(work, tmp_path):
    for out, more in (("all", []), ("last", ["--last", 6])):
        arguments = ["--tasks", "kv", "--lengths", "256", "--candidates", "window(8)", "--out", tmp_path / out]
        done = attnsieve("measure", work / "model", *arguments, *more)
        assert done.exit_code == 0, done.output
    whole, last = (Measurement.from_pretrained(tmp_path / out) for out in ("all", "last"))
    assert last.provenance["last"] == 6
    # Answers stand behind the prompts.
    assert last.lengths[0] > whole.lengths[0]
    arguments = ["--lengths", "256", "--candidates", "window(8)", "--out", tmp_path / "x"]
    assert "last must be a number of rows" in refused("measure", work / "model", *arguments, "--tasks", "kv", "--last", 300)
    told = refused("measure", work / "model", *arguments, "--tasks", "perplexity", "--last", 6)
    assert "'perplexity' has none: expected tasks such as kv" in told


def test_texts_that_end_in_an_answer():
    tokens = tokenizer()
    texts = text_reader([], "kv", answered=True)(tokens, 900, 4, 7)
    places = []
    for text in texts:
        *pairs, question = tokens.decode(text).strip().split("\n")
        key, _, value = question.partition(": ")
        places.append(next(x for x, pair in enumerate(pairs) if pair == f"{key}: {value}") / len(pairs))
    assert places == sorted(places)
    assert places[-1] - places[0] > 0.3


def test_run_prints_the_text_and_nothing_else(work):
    done = attnsieve("run", work / "model", "--pattern", "sink(4) | window(8)", "--prompt", "hello", "--max-new-tokens", 5)
    assert done.exit_code == 0
    assert "5 new tokens" in done.stderr
    assert "attention calls that ran sparse: 2 prefill, 8 decode" in done.stderr
    (work / "prompt.txt").write_text("hello")
    again = attnsieve(
        "run",
        work / "model",
        "--pattern",
        "sink(4) | window(8)",
        "--prompt-file",
        work / "prompt.txt",
        "--max-new-tokens",
        5,
        "--json",
    )
    printed = json.loads(again.stdout)
    assert printed["text"].strip() == done.stdout.strip()
    assert (printed["prompt_tokens"], printed["new_tokens"], printed["report"]["sparse_calls"]) == (5, 5, 10)


def test_run_follows_the_plan(work):
    arguments = ["--prompt", "a long enough prompt", "--max-new-tokens", 20, "--json"]
    texts = [
        json.loads(attnsieve("run", work / "model", *choice, *arguments).stdout)["text"]
        for choice in (("--plan", work / "plan"), ("--pattern", "window(1)"), ("--pattern", "dense()"))
    ]
    assert texts[1] != texts[2]
    assert len(texts[0]) > 0


def test_show_describes_and_draws(work, tmp_path):
    done = attnsieve("show", work / "plan", work / "profile", "--heads", "0:1", "--out", tmp_path / "figures")
    assert done.exit_code == 0
    assert "plan for llama: 2 layers x 4 heads" in done.stdout
    assert "profile of llama: 2 layers x 4 heads" in done.stdout
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "density.png",
        "heads.png",
        "kinds.png",
        "masks.png",
        "retained.png",
    ]
    page = attnsieve("show", work / "plan", work / "profile", "--html", tmp_path / "report.html", "--heads", "1:0")
    assert page.exit_code == 0, page.output
    assert "wrote" in page.stderr
    assert (tmp_path / "report.html").stat().st_size > 30_000
    printed = json.loads(attnsieve("show", work / "plan", "--json").stdout)
    assert printed["plan"]["heads"] == {"static": 8}
    assert printed["figures"] == []


def test_show_compares_profiles_and_draws_measurements(work, tmp_path):
    common = ["--pcl", 16, "--lengths", "32", "--documents", 1, "--seed", 5]
    attnsieve("profile", work / "model", "--data", work / "text.txt", *common, "--out", tmp_path / "other")
    done = attnsieve("show", work / "profile", tmp_path / "other", "--preset", "paper", "--out", tmp_path / "figures", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["stability"]["names"] == [str(work / "profile"), str(tmp_path / "other")]
    assert (tmp_path / "figures" / "stability.png").exists()
    told = attnsieve("show", work / "profile", tmp_path / "other").stdout
    assert "a fixed mask can serve" in told
    arguments = ["--data", work / "text.txt", "--lengths", "64", "--candidates", "window(8)", "--out", tmp_path / "m"]
    attnsieve("measure", work / "model", *arguments)
    done = attnsieve("show", tmp_path / "m", work / "plan", "--out", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    assert "| window(8) " in done.stdout
    assert (tmp_path / "figures" / "retained-by-length.png").exists()


def test_eval_writes_rows_that_show_reads(work, tmp_path):
    arguments = [
        "--pattern",
        "sink(4) | window(8)",
        "--plan",
        work / "plan",
        "--lengths",
        "128",
        "--items",
        2,
        "--out",
        tmp_path / "a.jsonl",
    ]
    done = attnsieve("eval", work / "model", "--tasks", "kv,fidelity", *arguments)
    assert done.exit_code == 0, done.output
    assert "| kv " in done.stdout
    assert "sink(4) \\| window(8)" in done.stdout
    again = json.loads(attnsieve("eval", work / "model", "--tasks", "kv", *arguments, "--json").stdout)["rows"]
    assert {row["plan"] for row in again} == {"dense", "sink(4) | window(8)", str(work / "plan")}
    assert len(again) == 9
    shown = attnsieve("show", tmp_path / "a.jsonl", "--out", tmp_path / "figures")
    assert shown.stdout == done.stdout
    assert (tmp_path / "figures" / "answer_nll.png").exists()


def test_hints_are_commands_where_paths_have_spaces(work, tmp_path):
    out = tmp_path / "a plan"
    done = attnsieve("fit", work / "profile", "--preset", "paper", "--tau", 0.35, "--out", out)
    assert f"attnsieve show '{out}', attnsieve run MODEL --plan '{out}'" in done.stderr
    assert f"show '{out}/robust' '{out}/profile'" in next_steps("smollm2-135m", out)


def test_scaled_positions_are_positions(work):
    model = LlamaForCausalLM.from_pretrained(work / "model")
    assert longest_text(model) == 512
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    model.config.rope_parameters = scaled
    check_room(model, 2000, 48)
    with pytest.raises(UserError, match="more than the model's 2048 positions"):
        check_room(model, 2000, 49)


def test_byte_order_marks_and_line_ends_are_no_text(tmp_path):
    for name in ("prompt.txt", "book.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == text_source(tmp_path / "book.txt").read(9) == "one\ntwo\n"


def test_version_and_help():
    assert attnsieve("--version").stdout == f"attnsieve {package.__version__}\n"
    for command in ("profile", "measure", "fit", "show", "run", "eval"):
        done = attnsieve(command, "--help")
        assert done.exit_code == 0
        assert "Example: attnsieve" in done.stdout or command == "show"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "attnsieve", "show", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_reading_options():
    assert lengths_of("512, 4K") == [512, 4096]
    assert named_values(["a=1", "b=0.5", "c=true", "d=none", "e=mass"]) == {"a": 1, "b": 0.5, "c": True, "d": None, "e": "mass"}
    with pytest.raises(UserError):
        lengths_of("0")
