"""The recall task: what it contains, that it can be solved, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from attnsieve import UserError
from attnsieve.nn.mqar import IGNORED, RecallTask


@pytest.mark.parametrize(("length", "pairs"), [(64, 16), (64, 4), (256, 8), (4, 1)])
def test_every_key_is_asked_once_and_its_value_is_the_label(length, pairs):
    ids, labels = RecallTask(length, pairs, vocabulary=600).sample(50, 1)
    assert ids.shape == labels.shape == (50, length)
    for row, asked in zip(ids, labels, strict=True):
        memory = dict(zip(row[: 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist(), strict=True))
        places = (asked != IGNORED).nonzero().flatten()
        assert len(memory) == len(places) == pairs
        assert int(places[0]) > 2 * pairs
        assert {int(row[t - 1]): int(asked[t]) for t in places} == memory
        assert all(0 < key < 300 for key in memory)
        assert all(300 <= value < 600 for value in memory.values())
        assert len(set(memory.values())) == pairs


def test_seeds_repeat_and_differ():
    task = RecallTask(64, 8, vocabulary=100)
    assert torch.equal(task.sample(5, 3)[0], task.sample(5, 3)[0])
    assert not torch.equal(task.sample(5, 3)[0], task.sample(5, 4)[0])


def test_easier_rows_have_fewer_pairs():
    ids, labels = RecallTask(64, 8, vocabulary=1000).sample(60, torch.Generator().manual_seed(0), levels=3)
    counts = (labels != IGNORED).sum(1)
    assert counts.tolist() == [8, 4, 2] * 20
    for row, asked in zip(ids[1::3], labels[1::3], strict=True):
        memory = dict(zip(row[:8:2].tolist(), row[1:8:2].tolist(), strict=True))
        assert {int(row[t - 1]): int(asked[t]) for t in (asked != IGNORED).nonzero().flatten()} == memory
    assert (labels[2::3] != IGNORED).nonzero()[:, 1].min() == 5


def test_without_noise_there_is_nothing_but_pairs_and_questions():
    ids, labels = RecallTask(64, 8, vocabulary=100, noise=False).sample(20, 0)
    assert ((ids != 0).sum(1) == 24).all()
    assert ids[:, :-1][labels[:, 1:] != IGNORED].ge(1).all()


def test_gaps_follow_the_power_law():
    task = RecallTask(256, 1, vocabulary=300, power=0.01)
    _, labels = task.sample(20000, 0)
    gap = ((labels != IGNORED).nonzero()[:, 1] - 3) // 2
    counts = torch.bincount(gap, minlength=127).double() / 20000
    law = torch.arange(1, 128).double() ** (0.01 - 1)
    assert float((counts - law / law.sum()).abs().max()) < 0.015


@pytest.mark.parametrize(
    ("arguments", "word"), [((60, 16), "pairs"), ((65, 4), "even"), ((64, 0), "pairs"), ((64, 8, 16), "vocabulary")]
)
def test_impossible_tasks_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        RecallTask(*arguments)


def test_many_examples_are_drawn_in_parts_that_differ():
    task = RecallTask(8, 2, vocabulary=20)
    ids, labels = task.sample(2500, 0)
    assert len(ids) == len(labels) == 2500
    assert len(ids.unique(dim=0)) > 2000
