"""Streaming capture against eager softmax maps."""

import itertools

import pytest
import torch

from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.profiling import Capture

LAYERS, PCL = 2, 11


def fingerprint(heads=6, kv_heads=2, width=10):
    return Fingerprint("toy", LAYERS, heads, kv_heads, width, "0" * 16)


def eager(q, k, scale, window=None):
    """Softmax maps [Hq, T, T] of one document, written out with K repeated."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (distance < 0) | (distance >= (window or q.shape[1]))
    return (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def documents(lengths, model, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads, n: torch.randn(LAYERS, heads, n, model.head_dim, generator=generator).to(dtype)  # noqa: E731
    return [(draw(model.heads, n), draw(model.kv_heads, n)) for n in lengths]


def capture_batch(capture, docs, pads, scale, window=None):
    """One padded batch; the padding is NaN, so reading it would show."""
    slots = max(pad + q.shape[2] for (q, _), pad in zip(docs, pads, strict=True)) + 3
    spans = [(row, pad, q.shape[2]) for row, ((q, _), pad) in enumerate(zip(docs, pads, strict=True))]
    for layer in range(LAYERS):
        q, k = (torch.full((len(docs), doc.shape[1], slots, doc.shape[3]), torch.nan, dtype=doc.dtype) for doc in docs[0])
        for (row, start, n), (doc_q, doc_k) in zip(spans, docs, strict=True):
            q[row, :, start : start + n], k[row, :, start : start + n] = doc_q[layer], doc_k[layer]
        capture.add(layer, q, k, scale=scale, spans=spans, window=window)


def expected_maps(docs, layer, scale, window=None):
    total, count = torch.zeros(docs[0][0].shape[1], PCL, PCL, dtype=torch.float64), torch.zeros(PCL)
    for q, k in docs:
        n = min(q.shape[2], PCL)
        total[:, :n, :n] += eager(q[layer, :, :n].double(), k[layer, :, :n].double(), scale, window)
        count[:n] += 1
    return total / count[:, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
def test_maps_equal_eager_softmax(dtype, window, heads, kv_heads):
    model = fingerprint(heads, kv_heads)
    docs = documents([PCL, 7, 23, 1], model, dtype)
    capture = Capture(model, pcl=PCL, lengths=(), chunk_bytes=1000)
    capture_batch(capture, docs, [0, 5, 2, 9], 0.4, window)
    profile = capture.finish()
    assert profile.rows_seen.tolist() == [4] + [3] * 6 + [2] * 4
    for layer in range(LAYERS):
        torch.testing.assert_close(profile.maps[layer].double(), expected_maps(docs, layer, 0.4, window), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk_bytes", [1, 1500, 1 << 20])
@pytest.mark.parametrize("window", [None, 6])
def test_long_statistics_equal_eager_sums(chunk_bytes, window):
    model, lengths = fingerprint(), (17, 24)
    docs = documents([30, 17, 23, 24, 8], model)
    capture = Capture(model, pcl=PCL, lengths=lengths, chunk_bytes=chunk_bytes)
    capture_batch(capture, docs, [0, 1, 2, 0, 4], 0.3, window)
    for statistics, n in zip(capture.finish().long, lengths, strict=True):
        long_enough = [doc for doc in docs if doc[0].shape[2] >= n]
        assert statistics.rows == len(long_enough) * (n - PCL)
        for layer in range(LAYERS):
            maps = sum(eager(q[layer, :, :n].double(), k[layer, :, :n].double(), 0.3, window) for q, k in long_enough)
            maps[:, :PCL] = 0
            offsets = torch.stack([maps.diagonal(-d, 1, 2).sum(-1) for d in range(n)], -1)
            torch.testing.assert_close(statistics.column_mass[layer].double(), maps.sum(1), atol=1e-5, rtol=1e-6)
            torch.testing.assert_close(statistics.offset_mass[layer].double(), offsets, atol=1e-5, rtol=1e-6)


def test_chunks_batches_and_order_do_not_matter():
    model = fingerprint()
    docs = documents([12, 20, 9, 20], model)
    profiles = []
    for order, chunk_bytes, sizes in (((0, 1, 2, 3), 1 << 20, (4,)), ((3, 2, 0, 1), 700, (1, 3)), ((1, 0, 3, 2), 1, (2, 2))):
        capture, queue = Capture(model, pcl=PCL, lengths=(20,), chunk_bytes=chunk_bytes), iter(order)
        for size in sizes:
            batch = [docs[index] for index in itertools.islice(queue, size)]
            capture_batch(capture, batch, list(range(size)), 0.3)
        profiles.append(capture.finish())
    for other in profiles[1:]:
        torch.testing.assert_close(other.maps, profiles[0].maps, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.long[0].offset_mass, profiles[0].long[0].offset_mass, atol=1e-5, rtol=0)


def test_packed_documents_do_not_see_each_other():
    model = fingerprint()
    docs = documents([13, 15], model)
    packed, apart = (Capture(model, pcl=PCL, lengths=()) for _ in range(2))
    for layer in range(LAYERS):
        q, k = (torch.cat([doc[part][layer] for doc in docs], 1)[None] for part in (0, 1))
        packed.add(layer, q, k, scale=0.3, spans=[(0, 0, 13), (0, 13, 15)])
    capture_batch(apart, docs, [0, 0], 0.3)
    torch.testing.assert_close(packed.finish().maps, apart.finish().maps, atol=1e-6, rtol=0)


def test_rows_of_maps_and_masses_add_up():
    model = fingerprint()
    capture = Capture(model, pcl=PCL, lengths=(40,))
    capture_batch(capture, documents([40, 40], model), [0, 1], 1.0)
    profile = capture.finish()
    torch.testing.assert_close(profile.maps.sum(-1), torch.ones(LAYERS, 6, PCL))
    for mass in (profile.long[0].column_mass, profile.long[0].offset_mass):
        torch.testing.assert_close(mass.sum(-1), torch.full((LAYERS, 6), 2.0 * 29))


def test_nan_activations_are_reported_with_the_layer():
    model = fingerprint()
    capture = Capture(model, pcl=PCL, lengths=())
    q, k = torch.randn(1, 6, 12, 10), torch.randn(1, 2, 12, 10)
    k[0, 1, 5, 3] = torch.nan
    with pytest.raises(UserError, match=r"layer 1 has NaN.*batch row 0"):
        capture.add(1, q, k, scale=0.3, spans=[(0, 0, 12)])
    capture.add(1, q, k, scale=0.3, spans=[(0, 6, 6)])  # the NaN slot is padding now


def test_short_text_is_refused():
    model = fingerprint()
    capture = Capture(model, pcl=PCL, lengths=())
    capture_batch(capture, documents([10, 4], model), [0, 0], 0.3)
    with pytest.raises(UserError, match="no document reaches the last 1 rows"):
        capture.finish()
    capture = Capture(model, pcl=PCL, lengths=(30,))
    capture_batch(capture, documents([29], model), [0], 0.3)
    with pytest.raises(UserError, match="no document is long enough for length 30"):
        capture.finish()


def test_no_text_and_missing_layers_are_refused():
    model = fingerprint()
    with pytest.raises(UserError, match="long enough"):
        Capture(model, pcl=PCL, lengths=()).finish()
    capture = Capture(model, pcl=PCL, lengths=())
    capture.add(0, torch.randn(1, 6, 12, 10), torch.randn(1, 2, 12, 10), scale=1.0, spans=[(0, 0, 12)])
    with pytest.raises(UserError, match=r"layers \[1\] added no rows"):
        capture.finish()


def test_memory_is_refused_up_front():
    with pytest.raises(UserError, match=r"needs .* GiB .* lower the capture length"):
        Capture(fingerprint(), pcl=1000, lengths=(), memory_limit=10_000_000)
    big = Fingerprint("huge", 1000, 1000, 1000, 64, "0" * 16)
    with pytest.raises(UserError, match="profiling needs"):
        Capture(big, pcl=1 << 16, lengths=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pcl": 0}, "at least 1"), ({"lengths": (PCL,)}, "must exceed"), ({"maps": False, "lengths": ()}, "nothing to capture")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Capture(fingerprint(), **({"pcl": PCL, "lengths": ()} | settings))


def test_bad_spans_layers_and_shapes_are_refused():
    capture = Capture(fingerprint(), pcl=PCL, lengths=())
    q, k = torch.randn(1, 6, 12, 10), torch.randn(1, 2, 12, 10)
    for arguments in (
        (2, q, k, (0, 0, 12)),
        (0, q, k, (0, 4, 9)),
        (0, q, torch.randn(1, 4, 12, 10), (0, 0, 12)),
        (0, q[:, :, 3:], k, (0, 0, 9)),
        (0, q, k, (0, 0, 0)),
    ):
        with pytest.raises(UserError):
            capture.add(*arguments[:3], scale=1.0, spans=[arguments[3]])
