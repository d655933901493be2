"""run.py sets up again where its environment cannot serve any more, and says what is missing where it cannot set up."""

import importlib.util
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def script(tmp_path, monkeypatch):
    """run.py as it is in an empty project, with a set-up that takes no time."""
    spec = importlib.util.spec_from_file_location("run_script", Path(__file__).parents[1] / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settle(module, tmp_path, monkeypatch)
    for name in ("pip", "can_install"):
        monkeypatch.setattr(module, name, lambda *arguments: True)
    return module


def settle(module, root, monkeypatch):
    root.mkdir(exist_ok=True)
    (root / "pyproject.toml").write_text("")
    (root / "constraints.txt").write_text("")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "STAMP", root / ".venv" / "installed")
    monkeypatch.setattr(module, "PYTHON", root / ".venv" / module.PYTHON.relative_to(module.PYTHON.parents[1]))


def make(module):
    """Install, counting how often an environment is made."""
    made = []

    def create(path, **options):
        made.append(path)
        path.mkdir(exist_ok=True)
        module.PYTHON.parent.mkdir(exist_ok=True)
        module.PYTHON.unlink(missing_ok=True)
        module.PYTHON.write_text("#!/bin/sh\n")
        module.PYTHON.chmod(0o755)

    module.venv = type("venv", (), {"create": staticmethod(create)})
    module.install()
    return len(made)


def test_a_second_run_finds_the_environment(script):
    assert [make(script), make(script)] == [1, 0]
    (script.ROOT / "constraints.txt").write_text("torch==9")
    assert make(script) == 1


def test_an_environment_whose_python_is_gone_is_made_again(script):
    make(script)
    script.PYTHON.unlink()
    script.PYTHON.symlink_to(script.ROOT / "gone")
    assert [make(script), make(script)] == [1, 0]


def test_an_environment_that_was_moved_is_made_again(script, tmp_path, monkeypatch):
    make(script)
    moved = tmp_path / "else where"
    settle(script, moved, monkeypatch)
    (tmp_path / ".venv").rename(moved / ".venv")
    assert make(script) == 1


def test_a_python_without_venv_says_what_to_install(script):
    def create(path, **options):
        raise subprocess.CalledProcessError(1, "ensurepip")

    script.venv = type("venv", (), {"create": staticmethod(create)})
    with pytest.raises(SystemExit, match="python3-venv"):
        script.install()


@pytest.mark.parametrize(
    ("platform", "gpu", "cpu_build", "installed"),
    [
        ("linux", None, True, []),
        ("linux", None, False, ["torch==2.11.0"]),
        ("linux", "/usr/bin/nvidia-smi", True, ["torch==2.11.0"]),
        ("darwin", None, False, ["torch==2.13.0"]),
    ],
)
def test_torch_for_cuda_is_the_one_whose_triton_is_pinned(script, monkeypatch, platform, gpu, cpu_build, installed):
    found = []
    monkeypatch.setattr(script.sys, "platform", platform)
    monkeypatch.setattr(script.shutil, "which", lambda name: gpu)
    monkeypatch.setattr(script, "can_install", lambda *arguments: cpu_build)
    monkeypatch.setattr(script, "pip", lambda *arguments: found.append(arguments[-1]))
    script.install_torch()
    assert found == installed
    # torch 2.11 for CUDA asks for Triton 3.6.0.
    assert "triton==3.6.0\n" in (Path(__file__).parents[1] / "constraints.txt").read_text()
