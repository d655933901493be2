"""Launches past Triton: what compiled code is called for, and with what."""

import pytest

from tests.gpu_compiler import run_without_interpreter

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="by other versions launches are Triton's")
START = "from tests.launching_call import *\n"


def run(program: str) -> None:
    run_without_interpreter(START + program)


def test_the_second_launch_of_a_class_is_direct_with_the_same_arguments():
    run("""
first, second = launched(), launched()
assert first[0] == "triton" and second[0] == "code"
assert first[1:3] == second[1:3] and first[2] == (3, 2, 1)
assert len(first[3]) == len(second[3]) and first[3] == second[3]
assert launched(x=torch.zeros(64))[3][0] != first[3][0]
""")


@pytest.mark.parametrize(
    "change",
    [
        *("n=1", "n=16", "n=0", "n=2**31", "n=2**63", "n=-2**31 - 1", "n=True", "n=None", "factor=3"),
        *("x=torch.zeros(65)[1:]", "x=torch.zeros(64).half()", "x=None", "bundle=Bundle(y, 16)", "bundle=Bundle(y[1:], 7)"),
        *(
            "bundle=Bundle(None, 7)",
            "FLAG=True",
            "FLAG=1.0",
            "SHAPE=Shape(*map(tl.constexpr, (4, 8)))",
            "num_warps=8",
            "device=1",
        ),
    ],
)
def test_other_classes_are_compiled_for_themselves(change):
    run(f"""
launched()
assert launched()[0] == "code"
other = dict({change})
assert launched(**other)[0] == "triton"
assert launched(**other)[0] == "code" and launched()[0] == "code"
""")


@pytest.mark.parametrize(
    "change", ["n=23", "n=-7", "n=2**31 - 1", "bundle=Bundle(y, 23)", "bundle=Bundle(torch.zeros(8), 7)", "factor=3.5"]
)
def test_one_class_shares_its_code(change):
    run(f"""
launched()
assert launched({change})[0] == "code"
""")


def test_who_listens_sees_triton_launch():
    run("""
from triton import knobs
launched()
listener = lambda *_: None
knobs.runtime.launch_enter_hook.add(listener)
assert launched()[0] == "triton"
knobs.runtime.launch_enter_hook.remove(listener)
assert launched()[0] == "code"
noted = []
launching.listen(lambda *launch: noted.append(launch))
knobs.runtime.launch_enter_hook.add(listener)
launched()
launching.listen(None)
launched()
assert len(noted) == 1 and noted[0][1] == (3, 2, 1) and noted[0][2][-2:] == (False, shape)
""")


@pytest.mark.parametrize("version", ["3.7.1", "4.0.0"])
def test_other_versions_launch_themselves(version):
    run(f"""
triton.__version__ = {version!r}
assert {{launched()[0] for _ in range(4)}} == {{"triton"}}
""")


def test_kernels_of_attention_get_the_same_arguments_past_triton():
    run("""
import tests.kernel_hashes as samples
from dataclasses import replace
from attnsieve.backends.triton import gradients, hopper, product_columns
from attnsieve.backends.triton.function import attend
from tests.launching_call import launches

product_columns.columns_dtype = lambda call: torch.bfloat16
hopper._capability, hopper.multiprocessors = (lambda device: (9, 0)), (lambda device: 132)
# Kernels write nothing, and some of what they would have written is read back.
for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
    setattr(place, name, lambda *args, real=getattr(place, name), **options: real(*args, **options).zero_())

def launched_by(call):
    del launches[:]
    call = replace(call, layout=replace(call.layout))
    out, lse = attend(call)
    gradients.gradients(call, out, lse, out, None)
    return list(launches)

seen = set()
for name, call in samples.calls():
    if name in ("columns, 8 masks", "listed keys"):
        first, second = launched_by(call), launched_by(call)
        assert [one[1:3] for one in first] == [one[1:3] for one in second]
        for one, other in zip(first, second, strict=True):
            assert other[0] == "code", other[1]
            # Addresses differ.
            assert all(a == b or min(a, b) > 2**20 for a, b in zip(one[3], other[3], strict=True)), other[1]
        seen |= {one[1] for one in second}
assert {"forward_kernel", "forward_hopper", "dkv_hopper", "dq_kernel", "count_tiles"} <= seen, seen
""")
