"""The demo on a tiny model: every step runs, its numbers are those in the rows, and an earlier run is replaced."""

import pytest
import torch

from attnsieve.cli.demo import Story, cost_table, halves, layer_table
from attnsieve.evaluation import read_rows
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Profile
from attnsieve.show import percent
from tests.cli_tiny import attnsieve, save_tiny_model
from tests.evaluation_tiny import plan_density


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder that the demo wrote into, which held rows of an earlier run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_model(folder / "model")
    (folder / "out").mkdir()
    (folder / "out" / "rows.jsonl").write_text("torn by an earlier run\n")
    done = attnsieve("demo", "--model", folder / "model", "--length", 256, "--items", 2, "--out", folder / "out")
    assert done.exit_code == 0, done.output
    return folder / "out", done.stdout


def test_the_demo_leaves_everything_behind(told):
    out, _ = told
    assert Profile.from_pretrained(out / "profile").pcl == 64
    for preset, figures in (("paper", {"density.png", "retained.png"}), ("robust", {"density.png"}), ("adaptive", set())):
        assert Plan.from_pretrained(out / preset).provenance["preset"] == preset
        assert figures | {"heads.png"} <= {path.name for path in (out / "figures" / preset).iterdir()}
    assert {"exact_match.png", "answer_nll.png", "kl.png"} <= {path.name for path in (out / "figures" / "results").iterdir()}


def test_the_demo_prints_what_it_measured(told):
    out, printed = told
    rows = read_rows(out / "rows.jsonl")
    assert {(row.plan, row.task) for row in rows} == {
        (plan, task) for plan in ("dense", "paper", "robust", "adaptive") for task in ("kv", "fidelity")
    }
    nll = next(row.value for row in rows if row.plan == "paper" and row.metric == "answer_nll")
    line = next(line for line in printed.split("4. Measure")[1].splitlines() if line.startswith("| paper"))
    assert f" {nll:.3g} ± " in line
    assert f" {percent(plan_density(Plan.from_pretrained(out / 'paper'), 128))} | " in line
    for part in ("1. Profile", "2. Fit", "3. Run", "The right answer is ", "5. Look", "Try next:"):
        assert part in printed
        assert part in (out / "summary.txt").read_text()


def test_every_layer_has_a_line():
    rows = [[Pattern.parse("window(4)"), Pattern.parse("dense()")]] * 2
    plan = Plan(Fingerprint("llama", 2, 2, 1, 8, "0"), rows, {}, torch.tensor([[0.1, 1.0], [0.3, 1.0]]))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in layer_table({"a": plan}).splitlines()[2:]]
    assert cells == [["0", "55", "1 of 2"], ["1", "65", "1 of 2"], ["all", "60", "2 of 4"]]
    choosing = Plan.uniform(plan.fingerprint, "probed_keys()")
    assert layer_table({"a": plan, "b": choosing}).splitlines()[-1].replace(" ", "") == "|all|60|2of4|4of4|"


def test_costs_stand_in_one_line_per_plan():
    metrics = ("retained_mass", "kl", "top1_agreement", "exact_match", "answer_nll")
    rows = [{"plan": "a", "metric": name, "density": 0.25, "value": 0.5, "stderr": 0.1} for name in metrics]
    assert cost_table(rows, ["a"]).splitlines()[2].split("|")[1:3] == [" a         ", "        25 "]


def test_measuring_does_not_read_the_text_of_calibration():
    first, second = halves("python-docs")
    assert first.read(0) + second.read(0) == halves("python-docs")[0].read(0) + second.read(0)
    assert first.read(0)[:200] not in second.read(0)
    assert min(len(first.read(0)), len(second.read(0))) > 100_000


def test_the_story_is_kept_as_it_is_told(capsys):
    story = Story()
    story.title("One")
    story.say("word " * 40)
    story.show("a  b")
    assert story.text().startswith("One\n===\n\nword word")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
