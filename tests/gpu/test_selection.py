"""Choosing keys on a GPU: what a CPU chooses, without waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attnsieve import Spans, attend
from attnsieve.selection import choose
from attnsieve.testing import relative_error
from tests.test_selection import SAMPLES, VOTING, random_qk, shared

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where an operation waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", [*SAMPLES, *map(shared, VOTING)], ids=str)
def test_a_gpu_chooses_what_a_cpu_chooses(pattern):
    n = 300
    q, k = random_qk(2, 8, 2, n)
    rows = torch.arange(n)
    expected = choose([pattern] * 8, q, k).dense(rows, rows)
    layout = choose([pattern] * 8, q.cuda(), k.cuda())
    found = layout.dense(rows.cuda(), rows.cuda()).cpu()
    # Sums are rounded in another order, so that close calls may go either way.
    assert float((found != expected).float().mean()) < 2e-3


@pytest.mark.parametrize("pattern", [*SAMPLES, *map(shared, VOTING)], ids=str)
def test_choosing_never_waits(pattern):
    if "probed_keys" in str(pattern):
        pytest.skip("the longest list of single keys is read back")
    q, k = (tensor.cuda() for tensor in random_qk(2, 8, 2, 300))
    for queries in (q, q[:, :, -1:]):
        spans = Spans.full(2, queries.shape[2], 300, "cuda")
        choose([pattern] * 8, queries, k, spans=spans)
        with no_waiting():
            choose([pattern] * 8, queries, k, spans=spans)


@pytest.mark.parametrize("pattern", [shared(pattern) for pattern in VOTING], ids=str)
def test_masks_of_a_group_serve_all_its_heads(pattern):
    n = 300
    q, k = (tensor.cuda() for tensor in random_qk(1, 8, 2, n, width=64))
    v = torch.randn_like(k)
    layout = choose([pattern] * 8, q, k)
    assert layout.heads == 2
    exact = attend(q.double(), k.double(), v.double(), layout, backend="reference")
    assert relative_error(attend(q, k, v, layout), exact) < 1e-3
