"""Shared settings: fixed seeds, hypothesis without deadlines (shared machines stall), Triton interpreted where no GPU is."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import interpreter  # noqa: F401  before any test module imports Triton

settings.register_profile("attnsieve", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnsieve")
if "PYTEST_XDIST_WORKER" in os.environ:
    # With a thread per core in every process, small operations wait for threads that others hold up: one test took 57 s for 2.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
