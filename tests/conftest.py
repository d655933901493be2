"""Shared settings: fixed seeds, two threads, hypothesis without deadlines (shared machines stall)."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("attnsieve", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnsieve")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
