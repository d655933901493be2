"""Ragged storage: a step over it equals attention over all keys, and it stores no key that no later row reads."""

import os
from importlib.util import find_spec

import pytest
import torch

from attnsieve import compile_layout
from attnsieve.backends.call import Call
from attnsieve.ragged import Kept, RaggedStore
from attnsieve.spans import Spans
from attnsieve.testing import assert_within_budget
from tests.laws.samples import SAMPLES

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = {"portable": torch.float64, "triton": torch.float32}
BACKEND = pytest.mark.parametrize(
    "backend", ["portable", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter"))]
)
STATIC = [pattern for pattern in SAMPLES if not any(atom.blocks(8) is not None for atom in pattern)]
CAPACITY = 140


def run(row, kv_heads, pieces, *, pads=(0,), backend="portable", width=16, v_width=8, dtype=None):
    """Feed random tokens: several at once, or as negative pieces in single steps, which are compared with the oracle.

    Returns the store and the number of rows that were compared.
    """
    dtype = dtype or BACKENDS[backend]
    n, batch = sum(map(abs, pieces)), len(pads)
    q, k = torch.randn(batch, len(row), n, width, dtype=dtype), torch.randn(batch, kv_heads, n, width, dtype=dtype)
    v = torch.randn(batch, kv_heads, n, v_width, dtype=dtype)
    for b, pad in enumerate(pads):
        k[b, :, :pad], v[b, :, :pad] = torch.nan, torch.nan  # padding is never read
    kept = Kept.of(row, kv_heads, CAPACITY)
    store = RaggedStore(kept, kept.index(torch.device("cpu"), 4), k, v)
    layout, past, compared = compile_layout(row, CAPACITY), 0, 0
    for piece in pieces:
        end = past + abs(piece)
        if piece > 0:
            store.fill(k[:, :, past:end], v[:, :, past:end], pads, past)
        else:
            steps = [[tensor[:, :, at : at + 1] for tensor in (q, k, v)] for at in range(past, end)]
            out, lse = (
                torch.cat(parts, dim=2) for parts in zip(*(store.step(*step, 0.4, backend) for step in steps), strict=True)
            )
            first = max(past, max(pads) + kept.corner)
            spans = Spans.left_padded(torch.tensor(pads), end - first, end)
            call = Call(q[:, :, first:end], k[:, :, :end].nan_to_num(), v[:, :, :end].nan_to_num(), layout, spans, 0.4)
            assert_within_budget(out[:, :, first - past :], lse[:, :, first - past :], call)
            compared += end - first
        past = end
    return store, compared


@BACKEND
@pytest.mark.parametrize("pattern", STATIC, ids=lambda pattern: str(pattern)[:40])
def test_steps_equal_the_oracle(pattern, backend):
    _, compared = run([pattern] * 4, 2, [36, -6, 40, -6], backend=backend)
    assert compared == 12
