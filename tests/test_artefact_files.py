"""Artefacts are saved whole or not at all, read as they were written, and pushed as saved."""

import os

import pytest
import torch

from attnsieve.artefact import base
from attnsieve.errors import UserError
from tests.artefact_samples import MAKERS, load, save


@pytest.fixture(params=MAKERS)
def saved(request, tmp_path):
    return save(request.param, tmp_path / "it")


def test_saved_is_loaded_equal(saved):
    made, folder = saved
    assert load(made, folder) == made
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert str(made).splitlines()[0] in (folder / "README.md").read_text()
    made.save_pretrained(folder)
    assert load(made, str(folder)) == made
    assert len(list(folder.iterdir())) == 3, "temporary files are left behind"


def test_difference_shows(saved):
    made, _ = saved
    torch.manual_seed(2)
    other = MAKERS[made.kind]()
    assert other != made
    assert made != 3


def test_a_failed_save_leaves_the_old_artefact(saved, monkeypatch):
    made, folder = saved
    monkeypatch.setattr(base, "digest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save_pretrained(folder)
    monkeypatch.undo()
    assert load(made, folder) == made
    assert len(list(folder.iterdir())) == 3


def test_where_nothing_can_be_written_is_a_user_error(saved):
    made, folder = saved
    with pytest.raises(UserError, match="cannot save the"):
        made.save_pretrained(folder / "config.json" / "below")
    with pytest.raises(UserError, match="do not apply"):
        made.save_pretrained(folder, config={"a": 1})
    with pytest.raises(TypeError):
        made.save_pretrained(folder, push_to_hub=True)


@pytest.mark.parametrize("given", ["", None, 3])
def test_what_is_no_path_is_refused(saved, monkeypatch, given):
    made, folder = saved
    monkeypatch.chdir(folder)
    for act in (made.save_pretrained, type(made).from_pretrained):
        with pytest.raises(UserError, match="expected the path of a directory"):
            act(given)
    assert type(made).from_pretrained(".") == made


@pytest.mark.timeout(60)
def test_models_and_other_artefacts_are_not_replaced(saved, tmp_path):
    made, folder = saved
    other = next(maker() for kind, maker in MAKERS.items() if kind != made.kind)
    with pytest.raises(UserError, match=f"holds 'attnsieve {made.kind}', which this {other.kind} would replace"):
        other.save_pretrained(folder)
    assert load(made, folder) == made
    for name, content in (("config.json", '{"model_type": "llama"}'), ("model.safetensors", "weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content)
        with pytest.raises(UserError, match="holds a model, which this"):
            made.save_pretrained(tmp_path / name)
        assert [(path.name, path.read_text()) for path in (tmp_path / name).iterdir()] == [(name, content)]
    with pytest.raises(UserError, match=f"holds nothing that attnsieve saves, expected a saved {made.kind}"):
        load(made, tmp_path / "config.json")


def test_a_readme_of_somebody_elses_is_not_replaced(saved, tmp_path):
    made, folder = saved
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(UserError, match=r"holds a README.md, which this"):
        made.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project"
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    made.save_pretrained(folder)
    assert load(made, folder) == made


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_refused_without_waiting_for_a_writer(saved, name):
    made, folder = saved
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="no regular file"):
        load(made, folder)


def test_other_files_in_the_directory_stay(saved):
    made, folder = saved
    (folder / "notes.txt").write_text("mine")
    made.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_missing_files_and_repositories_are_refused(saved, tmp_path):
    made, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        load(made, folder)
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        load(made, tmp_path)
    with pytest.raises(UserError, match="neither a directory nor"):
        type(made).from_pretrained("no-such/repository", local_files_only=True)
    with pytest.raises(UserError, match="neither a directory nor"):
        type(made).from_pretrained("not a valid name / at all", local_files_only=True)


def test_pushing_uploads_what_saving_writes(saved, monkeypatch):
    made, _ = saved
    seen = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Created", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            seen[repo_id] = load(made, folder_path)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    made.push_to_hub("someone/something")
    assert seen == {"someone/something": made}
