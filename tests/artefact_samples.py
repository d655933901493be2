"""A plan and a profile that hold all that such artefacts can, saved, loaded and signed anew."""

import json

import torch

from attnsieve.artefact.strict import digest
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern, columns, dense, diagonals, sink, window
from attnsieve.plan import Plan
from attnsieve.profiling import LongStatistics, Profile

MODEL = Fingerprint("toy", 2, 3, 1, 16, "0123456789abcdef")
CORNER = Pattern.of(Captured.from_mask(torch.ones(11, 11).tril().bool())) | columns(0, 3, start=11) | diagonals(0, 7, start=11)


def make_plan():
    rows = ((CORNER, sink(4) | window(9), dense()), (dense(), CORNER, CORNER | window(2)))
    return Plan(
        MODEL, rows, {"method": "test", "note": "ünïcode", "nested": [1, 2.5, None]}, torch.rand(2, 3), torch.rand(2, 3)
    )


def make_profile():
    maps = torch.rand(2, 3, 5, 5).tril() + torch.eye(5)
    mass = torch.rand(2, 3, 9)
    mass = mass / mass.sum(-1, keepdim=True) * 12
    long = LongStatistics(9, 12, mass, mass.flip(-1))
    return Profile(MODEL, 5, maps / maps.sum(-1, keepdim=True), torch.tensor([4, 4, 3, 3, 3]), (long,), {"data": "test"})


MAKERS = {"plan": make_plan, "profile": make_profile}


def save(kind, folder):
    """An artefact of this kind and the directory it is saved in."""
    torch.manual_seed(1)
    made = MAKERS[kind]()
    made.save_pretrained(folder)
    return made, folder


def load(made, folder):
    return type(made).from_pretrained(folder)


def resign(folder, config=None):
    """Write `config` (or the present one) with a digest that matches, as a malicious or mistaken writer would."""
    config = json.loads((folder / "config.json").read_text()) if config is None else dict(config)
    config.pop("digest", None)
    config["digest"] = digest(config, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
