"""Shared settings: fixed seeds, hypothesis without deadlines (shared machines stall), Triton interpreted where no GPU is."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import interpreter  # noqa: F401  before any test module imports Triton

settings.register_profile("attnsieve", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnsieve")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
