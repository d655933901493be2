"""Tensor parallelism: two processes compute what one does, scores that read all KV heads included."""

from __future__ import annotations

import pytest

from tests.two_processes import report_of

pytest.importorskip("transformers.distributed.tensor_parallel")


def test_two_processes_compute_what_one_does(tmp_path):
    report = report_of("nn_parallel_worker.py", tmp_path)
    for attention, found in report["models"].items():
        assert found["logits"] < 1e-6, attention
        assert found["gradients"] < 1e-4, attention
        assert found["same_text"], attention
        assert found["share"] == 0.5, attention
    assert "KV heads" in report["refusal"]
