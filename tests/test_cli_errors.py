"""The commands refuse: one sentence on stderr, exit code 2, nothing on stdout."""

import shutil

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.cli_tiny import attnsieve, make_folder, refused, save_tiny_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("cli"))
    (folder / "evaluated.jsonl").write_text('{"model": "llama", "task": "kv"}\n')
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "{}/nowhere", "--data", "synthetic", "--out", "{}/x"], "no such directory"),
        (
            ["profile", "{}/nowhere", "--data", "synthetic", "--lengths", "512,2K", "--out", "{}/x"],
            "exceed the capture length --pcl",
        ),
        (["profile", "{}/model", "--data", "{}/nothing.txt", "--out", "{}/x"], "expected a path or one of: synthetic"),
        (["profile", "{}/model", "--data", "{}/empty.txt", "--out", "{}/x"], "is empty"),
        (
            ["profile", "{}/model", "--data", "{}/text.txt", "--lengths", "512", "--pcl", "9", "--out", "{}/x"],
            "give a longer text",
        ),
        (["profile", "{}/model", "--data", "synthetic", "--lengths", "many", "--out", "{}/x"], "got 'many'"),
        (["profile", "{}/model", "--data", "synthetic", "--out", "{}/text.txt"], "is a file: give a directory"),
        (["profile", "{}/model", "--data", "synthetic", "--out", "{}/model"], "model holds a model, which this profile"),
        (["profile", "{}/model", "--data", "synthetic", "--lengths", "513", "--out", "{}/x"], "more than the model's 512"),
        (["measure", "{}/model", "--data", "synthetic", "--lengths", "513", "--out", "{}/x"], "more than the model's 512"),
        (["fit", "{}/profile", "--out", "{}/profile"], "holds 'attnsieve profile', which this plan would replace"),
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
        (["fit", "{}/profile", "--density", ".5", "--out", "{}/x"], "is a profile: budgets need what attnsieve measure saves"),
        (["fit", "{}/plan", "--mass", ".5", "--out", "{}/x"], "expected a saved measurement"),
        (["measure", "{}/model", "--out", "{}/x"], "say what to measure on"),
        (["measure", "{}/model", "--data", "synthetic", "--candidates", "windw(3)", "--out", "{}/x"], "did you mean window?"),
        (
            ["measure", "{}/model", "--data", "a", "--candidates", "dense()", "--rows", "64", "--out", "{}/x"],
            "write them into yours",
        ),
        (["measure", "{}/model", "--data", "synthetic", "--rows", "65", "--out", "{}/x"], "at most its block of 64, got 65"),
        (["show", "{}/nowhere"], "is not there: give the directory"),
        (["show", "{}/text.txt"], "text.txt is no directory: give the directory"),
        (["show", "{}/model"], "holds 'a model', expected a saved plan, profile or measurement"),
        (["show", "{}/plan", "{}/plan"], "a second plan"),
        (["show", "{}/plan", "--heads", "0:1"], "say where with --out"),
        (["show", "{}/profile", "{}/profile"], "was given twice"),
        (["show", "{}/plan", "--html", "{}/x.pdf"], "saved as .html"),
        (["show", "{}/plan", "--heads", "9:1", "--out", "{}/x"], "no layer 9, head 1"),
        (["show", "{}/rows.jsonl"], "rows.jsonl is not there"),
        (["eval", "{}/model"], "say what to measure"),
        (["eval", "{}/model", "--pattern", "dense()", "--tasks", "kvv"], "did you mean kv?"),
        (["eval", "{}/model", "--pattern", "dense()", "--tasks", "kv", "--data", "x"], "none of the tasks kv reads it"),
        (
            ["eval", "{}/model", "--pattern", "dense()", "--tasks", "kv,longbench:trec", "--text", "bible"],
            "none of the tasks kv, longbench:trec reads it: leave it out, or add one of perplexity",
        ),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "-5"], "got '-5'"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "8"], "use a longer length"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "64,1K"], "1024 tokens are more than the model's 512"),
        (["eval", "{}/model", "--pattern", "dense()", "--out", "rows.csv"], "got 'rows.csv'"),
        (["eval", "{}/model", "--plan", "{}/profile"], "expected a saved plan"),
        (["eval", "{}/model", "--pattern", "dense()", "--lengths", "32,"], "an entry of the list '32,' is empty"),
        (["eval", "{}/model", "--pattern", "dense()", "--tasks", "kv,"], "an entry of the list 'kv,' is empty"),
        (["measure", "{}/model", "--tasks", ",kv", "--out", "{}/x"], "an entry of the list ',kv' is empty"),
        (["bench", "prefill", "--shapes", "qwen3-32b,,", "--lengths", "64"], "an entry of the list 'qwen3-32b,,' is empty"),
        (["bench", "prefill", "--masks", ";", "--lengths", "64"], "an entry of the list ';' is empty"),
        (["bench", "prefill", "--lengths", "64", "--out", "{}/evaluated.jsonl"], "holds no rows of benchmarks"),
        (["run", "{}/model", "--prompt", "a", "--plan", "{}/plan", "--pattern", "dense()"], "--plan DIRECTORY or --pattern"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "windw(4)"], "did you mean window?"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "empty()"], "8 heads keep no key in any row"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "dense_decode()"], "8 heads keep no key in any row"),
        (["run", "{}/model", "--prompt", "a", "--pattern", "last_queries(4)"], "8 heads keep no key in any row"),
        (["run", "{}/model", "--prompt", " ", "--pattern", "dense()"], "the prompt is empty"),
        (["run", "{}/model", "--prompt", "a\udcffb", "--pattern", "dense()"], "the prompt is not UTF-8"),
        (["run", "{}/model", "--prompt", "a", "--pattern", " "], "cannot read pattern ' '"),
        (["run", "{}/model", "--pattern", "dense()"], "--prompt TEXT or --prompt-file FILE"),
        (["run", "{}/model", "--prompt", "a", "--strict"], "--backend and --strict are for attention under a plan"),
        (["run", "{}/model", "--prompt", "a", "--backend", "dense"], "--backend and --strict are for attention under a plan"),
        (["bench", "prefil"], "choose from prefill, decode, forward_backward, layout, select, ttft"),
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


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["profile", "model", "--data", "", "--out", "x"], "--data"),
        (["profile", "model", "--data", "synthetic", "--out="], "--out"),
        (["measure", "", "--tasks", "kv", "--out", "x"], "measure"),
        (["measure", "model", "--tasks", "kv", "--out", ""], "--out"),
        (["fit", "profile", "", "--out", "x"], "profile"),
        (["fit", "profile", "--out", ""], "--out"),
        (["show", ""], "show"),
        (["show", "plan", "--out", ""], "--out"),
        (["show", "plan", "--html="], "--html"),
        (["run", "model", "--plan", "", "--prompt", "a"], "--plan"),
        (["run", "model", "--prompt-file", ""], "--prompt-file"),
        (["eval", "model", "--pattern", "dense()", "--out", ""], "--out"),
        (["eval", "model", "--pattern", "dense()", "--tasks", "perplexity", "--text="], "--text"),
        (["train", "--text", "", "--out", "x"], "--text"),
        (["train", "--text", "text.txt", "--out", ""], "--out"),
        (["train", "--text", "text.txt", "--out", "x", "--config", ""], "--config"),
        (["train", "--text", "text.txt", "--out", "x", "--tokenizer", ""], "--tokenizer"),
        (["train", "--text", "text.txt", "--out", "x", "--convert", ""], "--convert"),
        (["bench", "prefill", "--lengths", "64", "--out", ""], "--out"),
        (["demo", "--out", ""], "--out"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(work, monkeypatch, arguments, place):
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    assert refused(*arguments).startswith(f"attnsieve: {place} is followed by '': expected a value (the current folder is '.')")
    assert sorted(work.rglob("*")) == before


def test_read_only_places_are_refused_before_the_work(work, monkeypatch):
    monkeypatch.setattr("attnsieve.cli.options.os.access", lambda *_: False)
    for arguments in (["fit", "profile", "--out"], ["profile", "model", "--data", "synthetic", "--out"]):
        message = refused(arguments[0], work / arguments[1], *arguments[2:], work / "new/folder")
        assert message.endswith(f"cannot write to {work}/new/folder: {work} is read-only")
    rows = work / "rows.jsonl"
    assert "is read-only" in refused("eval", work / "model", "--pattern", "dense()", "--out", rows)


def test_places_inside_files_are_refused_before_the_work(work):
    text = work / "text.txt"
    for arguments in (["fit", "nothing", "--out"], ["profile", "nothing", "--data", "synthetic", "--out"]):
        assert refused(*arguments, text / "new/folder").endswith(f"cannot write to {text}/new/folder: {text} is a file")
    rows = text / "rows.jsonl"
    assert refused("eval", "nothing", "--pattern", "dense()", "--out", rows).endswith(f"{rows}: {text} is a file")


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


def test_tokens_that_the_model_does_not_know_are_refused(work):
    folder = save_tiny_model(work / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["a1", "b2", "c3", "gold"])
    tokenizer.save_pretrained(folder)
    sentence = "the model knows 0 to 259; use its own tokenizer"
    assert sentence in refused("run", folder, "--prompt", "All that is gold")
    text = ["--tasks", "perplexity", "--text", work / "text.txt", "--lengths", 50, "--items", 1]
    done = attnsieve("eval", folder, *text, "--pattern", "window(9)")
    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr


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
