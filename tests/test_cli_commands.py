"""The commands on a tiny model: what they write, what a program reads on stdout, and how they refuse."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaForCausalLM

import attnsieve as package
from attnsieve.cli.demo import next_steps
from attnsieve.cli.fit import named_values
from attnsieve.cli.options import lengths_of
from attnsieve.cli.run import check_room, read_prompt
from attnsieve.errors import UserError
from attnsieve.evaluation.text import text_source
from attnsieve.hf import longest_text
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile
from tests.cli_tiny import attnsieve, save_tiny_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, a profile of it and a plan from that, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)
    (folder / "empty.txt").write_text(" \n")
    common = ["--pcl", 16, "--lengths", "32", "--documents", 3]
    made = attnsieve("profile", folder / "model", "--data", folder / "text.txt", *common, "--out", folder / "profile")
    assert made.exit_code == 0, made.output
    made = attnsieve("fit", folder / "profile", "--preset", "paper", "--tau", 0.35, "--out", folder / "plan")
    assert made.exit_code == 0, made.output
    return folder


def refused(*arguments) -> str:
    """What a command that must fail says: one sentence on stderr, exit code 2, nothing on stdout."""
    done = attnsieve(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    # transformers shows a progress bar where a model had to be loaded first.
    sentences = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line]
    assert len(sentences) == 1, done.stderr
    assert sentences[0].startswith("attnsieve: ")
    return sentences[0]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "{}/nowhere", "--data", "synthetic", "--out", "{}/x"], "no such directory"),
        (["profile", "{}/model", "--data", "{}/nothing.txt", "--out", "{}/x"], "expected a path or one of: synthetic"),
        (["profile", "{}/model", "--data", "{}/empty.txt", "--out", "{}/x"], "is empty"),
        (["profile", "{}/model", "--data", "{}/text.txt", "--out", "{}/x"], "give a longer text"),
        (["profile", "{}/model", "--data", "synthetic", "--lengths", "many", "--out", "{}/x"], "got 'many'"),
        (["profile", "{}/model", "--data", "synthetic", "--out", "{}/text.txt"], "is a file: give a directory"),
        (["profile", "{}/model", "--data", "synthetic", "--dtype", "int8", "--out", "{}/x"], "choose from auto, float32"),
        (["profile", "{}/model", "--data", "synthetic", "--device", "gpu7", "--out", "{}/x"], "use auto, cpu, cuda"),
        (["profile", "{}/model", "--data", "synthetic", "--device", "meta", "--out", "{}/x"], "sees no such device"),
        (["profile", "{}/model", "--data", "synthetic", "--device", "cuda:99", "--out", "{}/x"], "sees no such device"),
        (["fit", "{}/profile", "--set", "preset=paper", "--out", "{}/x"], "preset: give it once"),
        (["fit", "{}/profile", "--set", "tau=1", "--tau", "1", "--out", "{}/x"], "tau: give it once"),
        (["fit", "{}/plan", "--out", "{}/x"], "holds 'attnsieve plan', expected a saved profile"),
        (["fit", "{}/profile", "--preset", "best", "--out", "{}/x"], "choose from paper, robust"),
        (["fit", "{}/profile", "--set", "tua=1", "--out", "{}/x"], "did you mean tau?"),
        (["fit", "{}/profile", "--set", "tau", "--out", "{}/x"], "NAME=VALUE"),
        (["fit", "{}/profile", "--preset", "paper", "--tau", "9", "--out", "{}/x"], "keep no key in any row"),
        (["fit", "{}/profile", "--density", ".5", "--out", "{}/x"], "expected a saved measurement"),
        (["fit", "{}/profile", "{}/profile", "--mass", ".5", "--out", "{}/x"], "expected a saved measurement"),
        (["measure", "{}/model", "--out", "{}/x"], "say what to measure on"),
        (["measure", "{}/model", "--data", "synthetic", "--candidates", "windw(3)", "--out", "{}/x"], "did you mean window?"),
        (
            ["measure", "{}/model", "--data", "a", "--candidates", "dense()", "--rows", "64", "--out", "{}/x"],
            "write them into yours",
        ),
        (["show", "{}/nowhere"], "is not there: give the directory"),
        (["show", "{}/model"], "expected a saved plan, profile or measurement"),
        (["show", "{}/plan", "{}/plan"], "a second plan"),
        (["show", "{}/plan", "--heads", "0:1"], "say where with --out"),
        (["show", "{}/profile", "{}/profile"], "was given twice"),
        (["show", "{}/plan", "--html", "{}/x.pdf"], "saved as .html"),
        (["show", "{}/plan", "--heads", "9:1", "--out", "{}/x"], "no layer 9, head 1"),
        (["show", "{}/rows.jsonl"], "rows.jsonl is not there"),
        (["eval", "{}/model"], "say what to measure"),
        (["eval", "{}/model", "--pattern", "dense()", "--tasks", "kvv"], "did you mean kv?"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "-5"], "got '-5'"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "8"], "use a longer length"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "64,1K"], "1024 tokens are more than the model's 512"),
        (["eval", "{}/model", "--pattern", "dense()", "--out", "rows.csv"], "got 'rows.csv'"),
        (["eval", "{}/model", "--plan", "{}/profile"], "expected a saved plan"),
        (["bench", "prefill", "--masks", ";", "--lengths", "64"], "give at least one mask"),
        (["run", "{}/model", "--prompt", "a", "--plan", "{}/plan", "--pattern", "dense()"], "--plan DIRECTORY or --pattern"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "windw(4)"], "did you mean window?"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "empty()"], "8 heads keep no key in any row"),
        (["run", "{}/model", "--prompt", " ", "--pattern", "dense()"], "the prompt is empty"),
        (["run", "{}/model", "--prompt", "a\udcffb", "--pattern", "dense()"], "the prompt is not UTF-8"),
        (["run", "{}/model", "--prompt", "a", "--pattern", ""], "cannot read pattern ''"),
        (["run", "{}/model", "--prompt", "a", "--plan", ""], "expected a directory with config.json"),
        (["run", "{}/model", "--pattern", "dense()"], "--prompt TEXT or --prompt-file FILE"),
        (["run", "{}/model", "--prompt-file", "{}/none", "--pattern", "dense()"], "none: No such file or directory"),
        (["run", "{}/model", "--prompt", "a" * 500, "--pattern", "dense()"], "more than the model's 512 positions"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "dense()", "--chat"], "no chat template"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "window(2)", "--backend", "cuda"], "unknown backend 'cuda'"),
        (
            ["run", "{}/model", "--prompt", "a", "--pattern", "window(2)", "--backend", "fa4"],
            "backend 'fa4' cannot serve",
        ),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(work, arguments, message):
    assert message in refused(*(str(argument).replace("{}", str(work)) for argument in arguments))


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


def test_a_model_that_computes_nan_is_refused(work):
    broken = LlamaForCausalLM.from_pretrained(work / "model")
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(work / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "model" / name, work / "broken" / name)
    arguments = ["--data", work / "text.txt", "--pcl", 16, "--lengths", "32", "--documents", 1, "--out", work / "x"]
    done = attnsieve("profile", work / "broken", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "layer 1 has NaN or infinite attention scores" in done.stderr
    assert not (work / "x").exists()


def test_a_plan_for_another_model_is_refused(work):
    save_tiny_model(work / "wider", head_dim=16)
    message = refused("run", work / "wider", "--plan", work / "plan", "--prompt", "a")
    assert "head_dim: made for 8, the model has 16" in message


def test_a_torn_plan_is_refused(work, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((work / "plan" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((work / "plan" / "model.safetensors").read_bytes()[:-3])
    assert "truncated" in refused("run", work / "model", "--plan", tmp_path, "--prompt", "a")


def test_our_own_mistakes_keep_their_traceback(work, monkeypatch):
    monkeypatch.setattr("attnsieve.cli.show.plan_text", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attnsieve("show", work / "plan")


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
