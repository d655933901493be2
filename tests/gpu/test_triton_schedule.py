"""Schedules on a GPU: those of chosen layouts never wait for the device and can be built in a graph; long ones are right."""

import pytest
import torch

from attnsieve import Spans, attend
from attnsieve.backends.call import Call
from attnsieve.layout import Layout
from attnsieve.patterns import dam_online, diagonals, pooled_blocks, probed_keys, sink, vertical_slash, window
from attnsieve.selection import choose
from attnsieve.testing import assert_within_budget
from tests.gpu.test_selection import no_waiting

schedule = pytest.importorskip("attnsieve.backends.triton.schedule", exc_type=ImportError).schedule
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FOREVER = 2**31 - 1
PATTERNS = [
    vertical_slash(mass=0.5, probe=32) | window(30),
    dam_online(tau=0.02, mu=0.2, probe=32) | diagonals(40, 41),
    pooled_blocks(ratio=0.5, block=64) | sink(3),
    probed_keys(mass=0.5, block=64, rows=4) | window(9),
]


def call_of(pattern, n=700, scale=2.0):
    q = scale * torch.randn(2, 8, n, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    spans = Spans.full(2, n, n, "cuda")
    return Call(q, k, v, choose([pattern] * 8, q, k, spans=spans), spans, 64**-0.5)


def run(call, layout):
    return attend(call.q, call.k, call.v, layout, spans=call.spans, return_lse=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_attention_over_a_chosen_layout_never_waits(pattern):
    call = call_of(pattern)
    assert_within_budget(*run(call, call.layout), call)
    call.layout.schedules.clear()
    with no_waiting():
        run(call, call.layout)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_chosen_layout_is_scheduled_in_a_graph(pattern):
    call = call_of(pattern)
    run(call, call.layout)
    call.layout.schedules.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(call, call.layout)
    call.layout.schedules.clear()
    # Other columns than those of the first call.
    call.layout.end.copy_(torch.where(torch.rand(call.layout.end.shape, device="cuda") < 0.05, FOREVER, call.layout.end))
    graph.replay()
    assert_within_budget(out, lse, call)


@pytest.mark.parametrize("chosen", [False, True])
def test_long_layouts(chosen):
    """More chunks of keys and distances than a program adds up at once."""
    n, positions, keys = 600_000, 128, 64
    generator = torch.Generator("cuda").manual_seed(0)
    column = torch.rand(1, 1, n, generator=generator, device="cuda") < 0.001
    end = torch.where(column, FOREVER, torch.arange(n, device="cuda") + 300).int()
    offset = torch.rand(1, 1, n, generator=generator, device="cuda") < 0.0001
    built = schedule(Layout(n, end, offset, passing=chosen, windows=chosen), positions, keys)
    listed = built.singles.items[0, 0, : int(column.sum())]
    assert torch.equal(listed.long(), column[0, 0].nonzero()[:, 0])
    # Sampled query tiles: key tiles with a pair in the window or at a kept distance.
    distances = torch.nn.functional.pad(offset[0, 0].long().cumsum(0), (1, 0))
    for t in (0, 1, 100, 2344, -(-n // positions) - 1):
        first, stop = t * positions, min((t + 1) * positions, n)
        b = torch.arange(-(-stop // keys), device="cuda")
        low = (first - (b * keys + keys - 1)).clamp_min(0)
        window = b * keys + keys - 1 + 300 > first
        expected = (window | (distances[stop - b * keys] > distances[low])).nonzero()[:, 0]
        start, count = (int(part.flatten()[t]) for part in (built.tiles.start, built.tiles.count))
        assert torch.equal(built.tiles.items[start : start + count].long().sort().values, expected)
