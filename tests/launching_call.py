"""A launch whose arguments can be changed, on tensors that pass for a GPU's; nothing is computed. For programs of `test_launching`."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from attnsieve import launching
from tests.gpu_compiler import record_launches

__all__ = ["Bundle", "Shape", "launched", "launching", "shape", "tl", "torch", "triton", "y"]

launches = record_launches()
x, y = torch.zeros(64), torch.zeros(8)


class Bundle(NamedTuple):
    p: Any
    n: Any


class Shape(NamedTuple):
    M: Any
    N: Any


shape = Shape(*map(tl.constexpr, (4, 4)))


@triton.jit
def kernel(p_x, bundle, n, factor, FLAG: tl.constexpr, SHAPE):
    if p_x is not None and bundle.p is not None:
        if n is not None:
            tl.store(p_x + n, factor + FLAG + SHAPE.M)
        tl.store(bundle.p + bundle.n, factor)


def launched(*, device=0, num_warps=4, **changes):
    """Who launched the kernel, its name, grid and arguments, see `record_launches`."""
    del launches[:]
    driver.active.get_current_device = lambda: device
    given = {"p_x": x, "bundle": Bundle(y, 7), "n": 5, "factor": 2.5, "FLAG": False, "SHAPE": shape}
    given |= {"p_x" if name == "x" else name: value for name, value in changes.items()}
    positional = [given[name] for name in ("p_x", "bundle", "n", "factor")]
    launching.launch(kernel, (3, 2), *positional, FLAG=given["FLAG"], SHAPE=given["SHAPE"], num_warps=num_warps)
    (one,) = launches
    return one
