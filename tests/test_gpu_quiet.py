"""When tests of time on a GPU are taken and when they are skipped, on a device of which the test says how it is shared."""

import random

import pytest

from tests.gpu import quiet

CYCLES_PER_MS = 2e6


@pytest.fixture
def device(monkeypatch):
    """How often its work is interrupted: `device["busy"]`, in which case all takes three times as long."""
    state = {"busy": 0.0, "clock": 0.0}
    chance = random.Random(0)

    def work(ms):
        state["clock"] += ms * (3 if chance.random() < state["busy"] else 1)

    def timed(run):
        before = state["clock"]
        run()
        return state["clock"] - before

    monkeypatch.setattr(quiet, "_wait", lambda cycles: work(cycles / CYCLES_PER_MS))
    monkeypatch.setattr(quiet, "_timed", timed)
    return {"state": state, "work": work}


@pytest.mark.parametrize("busy", [0.0, 0.3])
@pytest.mark.parametrize("ms", [0.4, 1.0, 2.5])
def test_times_are_those_of_an_undisturbed_call(ms, busy, device):
    device["state"]["busy"] = busy
    assert quiet.best_ms(lambda: device["work"](ms), expected=1.0) == pytest.approx(ms)


@pytest.mark.parametrize("ms", [0.4, 1.0, 2.5])
def test_on_a_shared_device_no_time_is_taken(ms, device):
    device["state"]["busy"] = 0.9
    with pytest.raises(pytest.skip.Exception, match="the GPU is shared: of 20 waits"):
        quiet.best_ms(lambda: device["work"](ms), expected=1.0)
