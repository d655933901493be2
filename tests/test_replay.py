"""Calls that are repeated by their launches alone: kernels get what they would have been given, and anything else is not repeated."""

import pytest

from tests.gpu_compiler import run_without_interpreter

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="by other versions launches are Triton's")
START = "from tests.replay_call import *\n"


def run(program: str) -> None:
    run_without_interpreter(START + program)


def test_kernels_get_the_same_arguments():
    run("""
x, y = torch.zeros(64), torch.zeros(64)
first, second, (third, out) = launched(x, y)[0], launched(x, y)[0], launched(x, y)
assert [one[:3] for one in second] == [("triton", "kernel", (2, 1, 1)), ("triton", "kernel", (1, 3, 1))]
assert [one[0] for one in third] == ["code", "code"]
a, b = third
assert a[3][:3] == [x.data_ptr(), y.data_ptr(), 7] and a[3][4:] == second[0][3][4:] and a[2] == (2, 1, 1)
assert a[3][3] == b[3][0]
assert b[3][1:3] == [kept.data_ptr(), 7] and b[3][3] == out.data_ptr() and b[3][4:] == second[1][3][4:] and b[2] == (1, 3, 1)
assert out.shape == x.shape and out.dtype == x.dtype
# Other tensors of the same sizes, after which the first are still themselves.
z = torch.zeros(64)
(c, d), other = launched(z, x)
assert c[0] == "code" and c[3][:3] == [z.data_ptr(), x.data_ptr(), 7] and d[3][3] == other.data_ptr() != out.data_ptr()
""")


def test_other_kinds_are_recorded_for_themselves():
    run("""
x, y = torch.zeros(64), torch.zeros(64)
for _ in range(2):
    assert ways(x, y) == ["triton"] * 2
assert ways(x, y) == ["code"] * 2
for other in (torch.zeros(32), torch.zeros(64, dtype=torch.float16), torch.zeros(128)[::2]):
    assert ways(other, y) == ["triton"] * 2
stream.cuda_stream = 5
assert ways(x, y) == ["triton"] * 2
stream.cuda_stream = 0
assert ways(x, y) == ["code"] * 2
assert ways(torch.zeros(65)[1:], y) == ["triton"] * 2
""")


def test_calls_that_do_more_are_never_repeated():
    run("""
x, y = torch.zeros(64), torch.zeros(64)
unrecorded = lambda: kernel[(1,)](kept, Bundle(kept, 7), kept, 5, None, STEP=4)
for more in (lambda: torch.zeros(3), lambda: kept.add_(1), lambda: kept.sum().item(), unrecorded):
    for _ in range(4):
        assert set(ways(x, y, more)) == {"triton"}
# One address for two tensors could be either's the next time.
for _ in range(4):
    assert set(ways(x, x)) == {"triton"}
assert ways(x, y) == ["triton"] * 2
assert ways(x, x) == ways(x, y) == ["code"] * 2
""")


def test_who_listens_or_records_sees_ordinary_calls():
    run("""
from triton import knobs
from torch.utils._python_dispatch import TorchDispatchMode
x, y = torch.zeros(64), torch.zeros(64)
for _ in range(3):
    ways(x, y)
known = lambda: ways(x, y) == ["code"] * 2
assert known()
listener = lambda *_: None
knobs.runtime.launch_enter_hook.add(listener)
assert not known()
knobs.runtime.launch_enter_hook.remove(listener)
assert known()
x.requires_grad_()
assert not known()
with torch.no_grad():
    assert known()
x.requires_grad_(False)
torch.cuda.is_current_stream_capturing = lambda: True
assert not known()
torch.cuda.is_current_stream_capturing = lambda: False
class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))
with Nothing():
    assert not known()
from torch.autograd import forward_ad
with forward_ad.dual_level():
    assert ways(forward_ad.make_dual(x, y), y) == ["triton"] * 2
class Special(torch.Tensor): pass
assert ways(x.as_subclass(Special), y) == ["triton"] * 2
assert known()
""")


def test_nothing_of_a_call_is_kept():
    run("""
import gc, weakref
x, y = torch.zeros(64), torch.zeros(64)
for _ in range(2):
    out = call(x, y)
assert any(isinstance(one, replay.Replay) for one in replay._known.values())
gone = [weakref.ref(tensor) for tensor in (x, y, out)]
del x, y, out
gc.collect()
assert [one() for one in gone] == [None] * 3
assert not [found for found in gc.get_objects() if type(found) in (replay._Recording, replay._Row)]
""")


def test_calls_that_write_elsewhere_in_the_result_are_never_repeated():
    run("""
x = torch.zeros(64)
def parts():
    out = torch.empty(2, 64)
    launch(kernel, (2,), x, Bundle(kept, 7), out, 5, None, STEP=4)
    launch(kernel, (2,), x, Bundle(kept, 7), out[1], 5, None, STEP=4)
    return out
def piece():
    room = torch.empty(2, 64)
    launch(kernel, (2,), x, Bundle(kept, 7), room, 5, None, STEP=4)
    return room[:, :5]
for run in (parts, piece):
    for _ in range(4):
        del launches[:]
        repeat((run,), [x], run)
        assert {one[0] for one in launches} == {"triton"}
""")
