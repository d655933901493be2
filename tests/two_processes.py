"""Runs a script in two processes, as torchrun does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def report_of(script: str, folder: Path) -> dict[str, Any]:
    """What the script of that name beside this file writes to report.json in the folder, its one argument."""
    path = Path(__file__).with_name(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path.parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
