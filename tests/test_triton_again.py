"""`again_kernel`, which looks after what the prefill kernel for Hopper GPUs leaves, interpreted."""

import pytest
import torch

from attnsieve.backends.call import Call
from attnsieve.bench.masks import selected
from attnsieve.spans import Spans
from tests.interpreter import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")]
N, QUERIES, GROUP, KV_HEADS, PROGRAMS, TILE = 150, 100, 2, 2, 3, 16


def _run(call, out, lse, spoilt):
    from attnsieve.backends.triton import forward
    from attnsieve.backends.triton.common import places_of, rows_of
    from attnsieve.backends.triton.geometry import Geometry, Tiles
    from attnsieve.backends.triton.schedule import schedule

    geometry = Geometry(call, Tiles(GROUP * TILE, 32, 4, 1))
    built = schedule(call.layout, geometry.positions, 32)
    forward.again_kernel[PROGRAMS, 1, 1](
        *(rows_of(x) for x in (call.q, call.k, call.v)),
        None,
        rows_of(out),
        lse,
        spoilt,
        places_of(call.spans),
        built.mask,
        built.singles,
        built.marks,
        call.scale,
        call.q.shape[2],
        geometry.query_tiles,
        geometry.total,
        geometry.shape(built),
        SLOTS=8,
        **geometry.options(),
    )


@pytest.mark.parametrize("program", [None, 0, 2 * PROGRAMS - 1])
def test_it_computes_tiles_with_an_lse_of_nan_again_and_no_others(program):
    """And none where no program says that there are any."""
    from attnsieve.backends import triton as backend

    q = torch.randn(2, KV_HEADS * GROUP, QUERIES, 32)
    k, v = torch.randn(2, 2, KV_HEADS, N, 32)
    spans = Spans.left_padded(torch.tensor([0, 37]), QUERIES, N)
    call = Call(q, k, v, selected(N, KV_HEADS, "cpu", 40), spans, 32**-0.5)
    out, lse = backend.run(call)
    found, found_lse = torch.full_like(out, 7.0), lse.clone()
    # Of the second text: its last row, the only one of the tile that begins at position 112; and of a head of the first text
    # position 145, in its last tile. Queries are their last 100 positions.
    found_lse[1, 3, -1] = torch.nan
    found_lse[0, 0, 95] = torch.nan
    spoilt = torch.zeros(2 * PROGRAMS, dtype=torch.int32)
    if program is not None:
        spoilt[program] = 1
    _run(call, found, found_lse, spoilt)
    again = torch.zeros(out.shape[:3], dtype=torch.bool)
    if program is not None:
        again[1, 2:, 112 - 13 :] = True
        again[0, :2, 144 - 50 :] = True
        torch.testing.assert_close(found_lse, lse)
    torch.testing.assert_close(found[again], out[again])
    assert bool((found[~again] == 7).all())
