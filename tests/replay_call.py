"""A call of two kernels that is repeated, on tensors that pass for a GPU's; nothing is computed. For programs of `test_replay`."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnsieve import launching, replay
from attnsieve.launching import launch
from attnsieve.replay import repeat
from tests.gpu_compiler import record_launches

__all__ = ["Bundle", "call", "kept", "kernel", "launch", "launched", "launches", "repeat", "replay", "stream", "torch", "ways"]

launches = record_launches()
# Ordinary launches are Triton's here, so that they are told apart from those of a replay.
launching.is_heard = lambda: True
stream = SimpleNamespace(cuda_stream=0)
torch.Tensor.is_cuda = property(lambda tensor: True)
torch.cuda.current_device = lambda: -1
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_stream = lambda device=None: stream
kept = torch.zeros(4)


class Bundle(NamedTuple):
    p: Any
    n: Any


@triton.jit
def kernel(p_in, bundle, p_out, n, missing, STEP: tl.constexpr):
    x = tl.load(p_in) + tl.load(bundle.p + bundle.n)
    tl.store(p_out + STEP, x + n)


def call(x, y, more=None):
    """Allocates a result and what lies between two kernels; calls with other `more` are of another kind."""

    def run():
        between = torch.empty(3, 64)
        launch(kernel, (2,), x, Bundle(y, 7), between[1], 5, None, STEP=4)
        out = torch.empty_like(x)
        launch(kernel, (1, 3), between[1], Bundle(kept, 7), out, 5, None, STEP=4)
        if more is not None:
            more()
        return out

    return repeat(("test", more), [x, y], run)


def launched(*arguments):
    """What was launched, see `record_launches`, and the result."""
    del launches[:]
    out = call(*arguments)
    return list(launches), out


def ways(*arguments):
    return [one[0] for one in launched(*arguments)[0]]
