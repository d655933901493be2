"""Plans: what they accept, what they refuse, and how they read."""

import json

import pytest
import torch

from attnsieve.artefact.strict import digest
from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.layout import compile_layout
from attnsieve.patterns import Captured, Pattern, columns, dense, diagonals, empty, sink, window
from attnsieve.plan import Plan

MODEL = Fingerprint("toy", 2, 3, 1, 16, "0123456789abcdef")


def captured(size=9, fill=True):
    return Pattern.of(Captured.from_mask(torch.full((size, size), fill).tril()))


def grid(pattern):
    return ((pattern,) * 3,) * 2


def test_uniform_takes_patterns_and_text():
    plan = Plan.uniform(MODEL, "sink(4) | window(256)")
    assert plan == Plan.uniform(MODEL, window(256) | sink(4))
    assert plan.row(1) == (sink(4) | window(256),) * 3
    assert plan.density is plan.retained is None


def test_row_outside_the_model_is_refused():
    for layer in (-1, 2):
        with pytest.raises(UserError, match="layers 0 to 1"):
            Plan.uniform(MODEL, dense()).row(layer)


@pytest.mark.parametrize("rows", [(), ((dense(),) * 3,), ((dense(),) * 3, (dense(),) * 2), ((dense(),) * 3,) * 3])
def test_wrong_counts_are_refused(rows):
    with pytest.raises(UserError, match="2 rows of 3 patterns"):
        Plan(MODEL, rows)


@pytest.mark.parametrize("nothing", [empty(), captured(fill=False), captured(5, False) | captured(9, False)])
def test_heads_that_keep_nothing_are_refused_by_name(nothing):
    with pytest.raises(UserError, match=r"6 heads keep no key in any row \(L0H0, L0H1, .* dense\(\)"):
        Plan(MODEL, grid(nothing))
    rows = ((dense(), dense(), nothing), (dense(),) * 3)
    with pytest.raises(UserError, match=r"1 heads .*\(L0H2\)"):
        Plan(MODEL, rows)


def test_a_head_with_empty_late_rows_is_the_methods_own_affair():
    assert Plan(MODEL, grid(captured())).row(0)[0] == captured()


def test_a_plan_is_made_for_a_fingerprint():
    for make in (lambda: Plan.uniform(torch.nn.Linear(2, 2), dense()), lambda: Plan(None, grid(dense()))):
        with pytest.raises(
            UserError, match=r"made for a Fingerprint, got (Linear|NoneType): attnsieve.hf.fingerprint\(model\)"
        ):
            make()


def test_another_model_is_refused_with_every_difference():
    plan = Plan.uniform(MODEL, dense())
    plan.check(MODEL)
    with pytest.raises(UserError, match=r"layers: made for 2, the model has 4; head_dim: made for 16, the model has 32"):
        plan.check(Fingerprint("toy", 4, 3, 1, 32, "0123456789abcdef"))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (torch.rand(2, 3).double(), "must be float32"),
        (torch.rand(3, 2), "must be float32"),
        (torch.full((2, 3), 1.1), "0 .. 1"),
        (torch.full((2, 3), torch.nan), "0 .. 1"),
        (torch.full((2, 3), -0.1), "0 .. 1"),
    ],
)
def test_bad_shares_are_refused(share, message):
    for name in ("density", "retained"):
        with pytest.raises(UserError, match=f"{name} .*{message}"):
            Plan(MODEL, grid(dense()), **{name: share})


@pytest.mark.parametrize("provenance", [{"a": torch.ones(1)}, {"a": float("nan")}, {"a": {1, 2}}])
def test_provenance_must_be_json(provenance):
    with pytest.raises(UserError, match="plain JSON"):
        Plan(MODEL, grid(dense()), provenance)


def test_provenance_is_kept_as_json_will_give_it_back():
    assert Plan(MODEL, grid(dense()), {"a": (1, 2), 3: None}).provenance == {"a": [1, 2], "3": None}


def test_equal_corners_are_stored_once(tmp_path):
    other = captured(9) | columns(0, start=9)
    plan = Plan(MODEL, ((captured(9), other, captured(12)), (other, other, other | diagonals(0, start=9))))
    assert len(plan.to_tensors()) == 2
    plan.save_pretrained(tmp_path)
    loaded = Plan.from_pretrained(tmp_path)
    assert loaded == plan
    for mine, theirs in zip(loaded.row(0), plan.row(0), strict=True):
        assert torch.equal(compile_layout([mine], 20).corner, compile_layout([theirs], 20).corner)


def test_views_and_shared_memory_are_saved_as_they_read(tmp_path):
    share = torch.rand(3, 2).T
    plan = Plan(MODEL, grid(dense()), density=share, retained=share)
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plan


def resign(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    del config["digest"]
    (folder / "config.json").write_text(json.dumps(config | {"digest": digest(config, folder / "model.safetensors")}))


def test_files_whose_parts_disagree_are_refused(tmp_path):
    Plan(MODEL, grid(captured())).save_pretrained(tmp_path)
    text = [[str(captured())] * 3] * 2
    cases = [
        ({"patterns": [["dense()"] * 3] * 2}, "belong to no pattern"),
        ({"patterns": [[str(captured(12))] * 3] * 2}, "not at hand"),
        ({"patterns": [[text[0][0].replace("9,", "10,")] * 3] * 2}, "needs uint8 bits of shape"),
        ({"patterns": [["dens()"] * 3] * 2}, "did you mean dense"),
        ({"patterns": [[7] * 3] * 2}, "must be text"),
        ({"patterns": text[:1]}, "2 rows of 3 patterns"),
        ({"patterns": "dense()"}, "list of lists"),
        ({"statistics": ["density"]}, "bytes, expected"),
        ({"statistics": ["colour"]}, "unknown statistics"),
        ({"corners": {}}, "bytes, expected"),
        ({"corners": {"0" * 16: 9}}, "must hold the tensors"),
        ({"corners": [9]}, "map digests to lengths"),
        ({"corners": {"x": 1 << 40}}, "length must be from 1"),
    ]
    before = (tmp_path / "config.json").read_bytes()
    for changes, message in cases:
        (tmp_path / "config.json").write_bytes(before)
        resign(tmp_path, **changes)
        with pytest.raises(UserError, match=message):
            Plan.from_pretrained(tmp_path)


def test_bits_that_are_not_causal_or_not_theirs_are_refused(tmp_path):
    Plan(MODEL, grid(captured())).save_pretrained(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    for place, value, message in ((-18, 0b11, "after their query"), (-1, 0x81, "after their query"), (-2, 0, "have digest")):
        changed = bytearray(data)
        changed[place] = value
        (tmp_path / "model.safetensors").write_bytes(changed)
        resign(tmp_path)
        with pytest.raises(UserError, match=message):
            Plan.from_pretrained(tmp_path)


def test_summary_counts_like_heads_and_stays_short():
    heads = 200
    model = Fingerprint("toy", 1, heads, 1, 16, "0" * 16)
    row = tuple(captured(9) | diagonals(*range(h % 150 + 1), start=9) for h in range(heads - 1))
    plan = Plan(model, ((*row, dense()),), {"method": "dam", "preset": "paper"}, torch.full((1, heads), 0.25))
    text = str(plan)
    assert text.startswith("plan for toy: 1 layers x 200 heads, method dam, preset paper\ndensity: mean 0.250")
    assert "captured(9) | diagonals(...)" in text
    assert len(text) < 1500
    assert repr(plan) == f"<{text.splitlines()[0]}>"


def test_text_in_the_place_of_a_pattern_is_refused():
    with pytest.raises(UserError, match=r"holds Pattern objects, got \['dense\(\)'\]: use Pattern.parse"):
        Plan(Fingerprint("llama", 1, 1, 1, 4, "0" * 16), [["dense()"]])
