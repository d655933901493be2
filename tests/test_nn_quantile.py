"""The fused kernels of the selection in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

PROGRAM = """
import torch
from attnsieve.nn import quantile_triton
from attnsieve.nn.quantile import walk

quantile_triton.TILE = 64
for n in (1, 2, 33, 64, 150):
    order = torch.stack([torch.randperm(n) for _ in range(2)]).int()
    for budget in (1, n // 2 + 1):
        k = torch.full_like(order, budget - 1)
        fused, answered = quantile_triton.kth_position(order, k), torch.arange(n) >= budget
        assert torch.equal(fused[:, answered], walk(order, k)[:, answered]), (n, budget)
        assert int(fused.min()) >= 0 and int(fused.max()) < n
print("equal")
"""


@pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
def test_fused_walk_equals_the_plain_one():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]
