"""A mask becomes spans only if the spans say exactly what the mask says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import Spans
from attnsieve.hf import masks
from attnsieve.hf.locate import SpanMemo
from attnsieve.hf.masks import OFFSET, mask_function, spans_of_mask


def written(spans, shape):
    """The mask [B, 1, Tq, Tk] that spans say, from their definition."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, q0, nq, k0, nk in spans.rows():
        for t in range(nq):
            mask[b, 0, q0 + t, k0 : k0 + nk - nq + t + 1] = True
    return mask


@st.composite
def batches(draw):
    """Rows of documents after an optional past: (spans, shape, slot of the first query's own key)."""
    past = draw(st.integers(0, 5))
    room = draw(st.integers(0, 4)) if past or draw(st.booleans()) else 0
    width = draw(st.integers(1, 12))
    rows = []
    batch = draw(st.integers(1, 3))
    for b in range(batch):
        slot = draw(st.integers(0, past + width - 1))
        while slot < past + width:
            length = draw(st.integers(1, past + width - slot))
            queries = slot + length - max(slot, past)
            if queries > 0:
                rows.append((b, max(slot, past) - past, queries, slot, length))
            slot += length + draw(st.integers(0, 3))
    return Spans.of(rows), (batch, 1, width, past + width + room), past


@given(batches())
def test_masks_of_spans_are_read_back(case):
    spans, shape, past = case
    mask = written(spans, shape)
    setattr(mask, OFFSET, past)
    read = spans_of_mask(mask)
    assert isinstance(read, Spans)
    assert torch.equal(written(read, shape), mask)
    if shape[2] > 1:
        assert sorted(read.rows()) == sorted(spans.rows())


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 1), st.data())
def test_any_mask_is_explained_exactly_or_refused(q_slots, past, room, data):
    k_slots = q_slots + past + room
    bits = data.draw(st.lists(st.booleans(), min_size=q_slots * k_slots, max_size=q_slots * k_slots))
    mask = torch.tensor(bits).view(1, 1, q_slots, k_slots)
    read = spans_of_mask(mask)
    if isinstance(read, Spans):
        assert torch.equal(written(read, mask.shape), mask)


def test_masks_are_read_in_pieces(monkeypatch):
    spans = Spans.left_padded(torch.tensor([0, 3, 9]), 10, 10)
    mask = written(spans, (3, 1, 10, 10))
    whole = spans_of_mask(mask).rows()
    monkeypatch.setattr(masks, "PIECE", 1)
    assert spans_of_mask(mask).rows() == whole


def test_right_padding_needs_the_note_of_the_mask_function():
    padding = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    mask = mask_function(batch_size=1, q_length=5, kv_length=5, attention_mask=padding)
    assert spans_of_mask(mask).rows() == [(0, 0, 3, 0, 3)]
    assert "own key" in spans_of_mask(mask.clone())


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("bidirectional", torch.ones(6, 6)),
        ("prefix", torch.ones(6, 6).tril().index_fill(1, torch.arange(3), 1)),
        ("without the own key", torch.ones(6, 6).tril(-1)),
        ("sliding window", torch.ones(6, 6).tril().triu(-2)),
        ("hole", torch.ones(6, 6).tril().index_fill(1, torch.tensor([2]), 0)),
        ("dilated", torch.ones(6, 6).tril() * (torch.arange(6) % 2)),
        ("bidirectional with room", torch.cat([torch.ones(4, 4), torch.zeros(4, 3)], dim=1)),
    ],
)
@pytest.mark.parametrize("noted", [True, False])
def test_other_masks_are_refused(name, mask, noted):
    mask = mask.bool()[None, None]
    if noted:
        setattr(mask, OFFSET, 0)
    assert isinstance(spans_of_mask(mask), str)


def test_static_caches_keep_the_note():
    mask = mask_function(batch_size=2, q_length=3, kv_length=9, q_offset=torch.tensor(4), allow_is_causal_skip=False)
    assert getattr(mask.contiguous(), OFFSET) == 4
    assert spans_of_mask(mask).rows() == [(0, 0, 3, 0, 7), (1, 0, 3, 0, 7)]


def test_a_new_mask_where_an_old_one_lay_is_read():
    memo = SpanMemo()
    for layer in range(0, 40, 2):
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        assert memo.get(layer, mask, None, lambda layer=layer: str(layer)) == str(layer)
        assert memo.get(layer + 1, mask, None, lambda: "again") == str(layer)
        del mask
