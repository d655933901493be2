"""Launches that are repeated: from the second one on Triton is not asked, and the kernel gets what Triton would have given it."""

import pytest

from tests.gpu_compiler import run_without_interpreter

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="by other versions launches are Triton's")
START = """
from dataclasses import replace
import torch
from attnsieve import Spans, compile_layout
from attnsieve.backends.call import Call
from attnsieve.patterns import *
from tests.gpu_compiler import record_launches
launches = record_launches()
from attnsieve.backends.triton.function import Repeated

def tensors(q_len, n=256, dtype=torch.bfloat16):
    return [torch.zeros(1, n, heads, 64, dtype=dtype)[:, :length].transpose(1, 2) for heads, length in ((4, q_len), (2, n), (2, n))]

def repeated(q_len):
    # Kernels write nothing here: nothing of the layout may be read back from them.
    layout = replace(compile_layout([columns(0, 9, 99) | window(h + 5) for h in range(4)], 512), passing=q_len > 8)
    return Repeated(Call(*tensors(q_len), layout, Spans.full(1, q_len, 256), 0.125))

def launched(run, *inputs):
    del launches[:]
    kept = run(*inputs)
    return list(launches), kept
"""


def run(program: str) -> None:
    run_without_interpreter(START + program)


@pytest.mark.parametrize(
    ("q_len", "kernels", "fresh"), [(256, ["forward_kernel"], 2), (1, ["decode_kernel", "combine_kernel"], 8)]
)
def test_kernels_get_the_same_arguments(q_len, kernels, fresh):
    run(f"""
again, inputs, whole = repeated({q_len}), tensors({q_len}), Spans.full(1, {q_len}, 256)
first, second, third = (launched(again, *inputs, whole) for _ in range(3))
assert [launch[:2] for launch in first[0]] == [("triton", name) for name in {kernels}]
assert [launch[:2] for launch in third[0]] == [("code", name) for name in {kernels}]
different = 0
for before, now in zip(second[0], third[0], strict=True):
    assert before[2] == now[2] and len(before[3]) == len(now[3])
    different += sum(a is not b and a != b for a, b in zip(before[3], now[3]))
# Outputs and what lies between two kernels are allocated anew.
assert 0 < different <= {fresh}
""")


@pytest.mark.parametrize("q_len", [256, 1])
def test_only_what_compiled_code_serves_is_launched_without_triton(q_len):
    run(f"""
from triton import knobs
again, (q, k, v), whole = repeated({q_len}), tensors({q_len}), Spans.full(1, {q_len}, 256)
ways = lambda *inputs: {{launch[0] for launch in launched(again, *inputs)[0]}}
for _ in range(3):
    ways(q, k, v, whole)
longer = torch.zeros(1, 2, 272, 64, dtype=k.dtype)
assert ways(q, longer[:, :, :256], longer[:, :, 16:], whole) == {{"code"}}
assert ways(*tensors({q_len}), whole) == {{"code"}}
assert ways(q, k, v, Spans.full(1, {q_len}, 256)) == {{"code"}}
# An address that is no multiple of 16, a stride that is none, strides beyond 32 bits.
shifted = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(1, 2, 256, 64)
assert "triton" in ways(q, shifted, v, whole)
odd = torch.zeros(1, 2, 256, 65, dtype=k.dtype)[..., :64]
assert "triton" in ways(q, odd, v, whole)
far = torch.zeros(64, dtype=k.dtype).as_strided(k.shape, (2**32, 0, 0, 1))
assert "triton" in ways(q, far, v, whole)
spans = Spans.of([(0, 0, {q_len}, 0, 256)])
assert "triton" in ways(q, k, v, spans)
assert ways(q, k, v, whole) == {{"code"}}
# Profilers listen to launches.
listener = lambda *_: None
knobs.runtime.launch_enter_hook.add(listener)
assert ways(q, k, v, whole) == {{"triton"}}
knobs.runtime.launch_enter_hook.remove(listener)
chain, knobs.runtime.launch_exit_hook = knobs.runtime.launch_exit_hook, listener
assert ways(q, k, v, whole) == {{"triton"}}
knobs.runtime.launch_exit_hook = chain
assert ways(q, k, v, whole) == {{"code"}}
""")


def test_steps_over_ragged_storage():
    run("""
from attnsieve.backends.triton.ragged import Step
from attnsieve.ragged import Kept, RaggedStore
kept = Kept.of([columns(0, 9, 99) | window(h + 5) for h in range(4)], 2, 512)
q, k, v = tensors(1, 1)
store = RaggedStore(kept, kept.index(q.device, 8), k, v)
step = Step(q, store.memory, store.index, 0.125)
ways = [[launch[:2] for launch in launched(step, q, k, v)[0]] for _ in range(3)]
names = ["append_kernel", "attend_kernel", "combine_kernel"]
assert ways[0] == [("triton", name) for name in names]
assert ways[1] == ways[2] == [("code", name) for name in names]
""")


@pytest.mark.parametrize("version", ["3.7.1", "3.9.0", "4.0.0"])
def test_other_versions_launch_themselves(version):
    run(f"""
import triton
triton.__version__ = {version!r}
again, inputs, whole = repeated(1), tensors(1), Spans.full(1, 1, 256)
assert {{launch[0] for _ in range(4) for launch in launched(again, *inputs, whole)[0]}} == {{"triton"}}
""")
