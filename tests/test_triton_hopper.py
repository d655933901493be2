"""The kernels for Hopper GPUs, which no interpreter runs: they compile, and Triton's serve all that they do not.

What they compute is checked on a GPU, tests/gpu/test_hopper.py.
"""

import pytest
import torch

from attnsieve import compile_layout
from attnsieve.backends.call import Call
from attnsieve.layout import Layout
from attnsieve.patterns import diagonals, sink
from attnsieve.spans import Spans
from tests.gpu_compiler import compiled

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are used with Triton 3.6 alone", allow_module_level=True)
hopper = pytest.importorskip("attnsieve.backends.triton.hopper")
schedule = pytest.importorskip("attnsieve.backends.triton.schedule").schedule

PROGRAM = """
import torch
from attnsieve import Spans
from attnsieve.backends.call import Call
from attnsieve.backends.triton import hopper, product_columns
from attnsieve.backends.triton.forward import forward
from attnsieve.backends.triton.gradients import key_gradients
from attnsieve.backends.triton.tuning import forward_tiles
from attnsieve.layout import Layout

product_columns.columns_dtype = lambda call: torch.bfloat16
hopper._capability = lambda device: (9, 0)
hopper.multiprocessors = lambda device: 2
n, group, width = 256, {group}, {width}
tensor = lambda heads: torch.zeros(1, heads, n, width, dtype=torch.{dtype})
bias = torch.zeros(1, 2, n) if {bias} else None
layout = Layout(n, torch.full((1, 2, n), n, dtype=torch.int32), most_keys=n)
k = torch.cat([tensor(2)] * 2, -1)[..., 1 : width + 1] if {odd} else tensor(2)
call = Call(tensor(2 * group), k, tensor(2), layout, Spans.full(1, n, n, "cpu"), 1.0, bias)
out, lse = forward(call, forward_tiles(call))
key_gradients(call, out, product_columns.row_columns(call, lse, lse))
"""


@pytest.mark.parametrize(
    ("group", "width", "dtype", "bias"), [(4, 128, "bfloat16", True), (1, 64, "float16", True), (7, 128, "float16", False)]
)
def test_the_kernels_compile(group, width, dtype, bias):
    names = compiled(PROGRAM.format(group=group, width=width, dtype=dtype, bias=bias, odd=False))
    assert "dkv_hopper" in names
    assert (["forward_hopper", "again_kernel"] if width == 128 else ["forward_kernel"]) == [
        name for name in names if name in ("forward_hopper", "again_kernel", "forward_kernel")
    ]


def test_rows_at_odd_addresses_are_copied_for_prefill_and_left_to_triton_for_gradients():
    names = compiled(PROGRAM.format(group=4, width=128, dtype="bfloat16", bias=False, odd=True))
    assert "forward_hopper" in names
    assert "dkv_hopper" not in names


def _serves(monkeypatch, layout, *, width=128, v_width=128, dtype=torch.bfloat16, capability=(9, 0)):
    monkeypatch.setattr(hopper, "_capability", lambda device: capability)
    n = layout.length
    q, v = torch.zeros(1, 2, n, width, dtype=dtype), torch.zeros(1, 2, n, v_width, dtype=dtype)
    call = Call(q, q, v, layout, Spans.full(1, n, n, "cpu"), 1.0)
    return hopper.serves(call, schedule(layout, 16, 64))


def _listed(n=64):
    return Layout(n, torch.full((1, 2, n), n, dtype=torch.int32), most_keys=n)


def test_it_serves_lists_of_all_keys_on_hopper(monkeypatch):
    assert _serves(monkeypatch, _listed())
    assert _serves(monkeypatch, _listed(), width=64, v_width=64, dtype=torch.float16)


@pytest.mark.parametrize(
    "other", [{"capability": (10, 0)}, {"dtype": torch.float32}, {"width": 96, "v_width": 96}, {"v_width": 64}], ids=str
)
def test_it_leaves_other_calls_to_triton(monkeypatch, other):
    assert not _serves(monkeypatch, _listed(), **other)


VIEWS = {
    "rows apart": (lambda x: torch.cat([x, x], -1)[..., :128], True),
    "all the same": (lambda x: x[..., :1, :1].expand(x.shape), True),
    "an odd number apart": (lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1], False),
    "at an odd address": (lambda x: torch.cat([x, x], -1)[..., 1:129], False),
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_must_begin_where_they_can_be_copied(view):
    """The kernels do not compile for others."""
    view, aligned = VIEWS[view]
    assert hopper.is_aligned(view(torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16))) == aligned


def test_it_leaves_key_tiles_to_triton(monkeypatch):
    assert not _serves(monkeypatch, compile_layout([sink(2) | diagonals(0, 30)] * 2, length=64))


def test_it_leaves_all_calls_to_other_versions_of_triton(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert not _serves(monkeypatch, _listed())
