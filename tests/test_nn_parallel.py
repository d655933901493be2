"""Tensor parallelism: two processes compute what one does, scores that read all KV heads included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers.distributed.tensor_parallel")


def test_two_processes_compute_what_one_does(tmp_path):
    worker = Path(__file__).with_name("nn_parallel_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for attention, found in report["models"].items():
        assert found["logits"] < 1e-6, attention
        assert found["gradients"] < 1e-4, attention
        assert found["same_text"], attention
        assert found["share"] == 0.5, attention
    assert "KV heads" in report["refusal"]
