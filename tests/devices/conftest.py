"""The machine that calls.py, replays.py and refusals.py run on, once per process."""

import gc

import pytest

from torchcall import _bridge


@pytest.fixture(scope="session")
def _machine():
    from devices.machine import Machine  # changes the process for good

    return Machine()


@pytest.fixture
def machine(_machine):
    """Two stand-in devices; after a test, nothing of its graphs may be left."""
    _machine.reset()
    yield _machine
    gc.collect()
    assert _machine.driver.live_execs() == 0
    assert _machine.driver.live_events() == 0
    assert _machine.driver.context_depth() == 0
    _bridge.set_most_graphs(64)
