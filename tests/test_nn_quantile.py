"""The walk behind the selection without a GPU, against counting."""

from __future__ import annotations

import pytest
import torch

from attnsieve.nn.quantile import kth_position


@pytest.mark.parametrize("n", [1, 2, 33, 64, 150])
@pytest.mark.parametrize("place", [0, 3, 70])
def test_kth_position_equals_a_sort_of_each_prefix(n, place):
    order = torch.stack([torch.randperm(n) for _ in range(2)]).int()
    found = kth_position(order, torch.full_like(order, place))
    assert int(found.min()) >= 0
    assert int(found.max()) < n
    for row, answers in zip(order, found, strict=True):
        expected = [int(row[:rank].sort().values[place]) for rank in range(place + 1, n)]
        assert answers[place + 1 :].tolist() == expected
