"""The simulated machine, created once per process."""

import gc

import pytest

from torchcall import _bridge


@pytest.fixture(scope="session")
def _machine():
    from devices.machine import Machine  # changes the process permanently

    return Machine()


@pytest.fixture
def machine(_machine):
    """Two simulated devices. Checks after each test that its graphs are destroyed."""
    _machine.reset()
    yield _machine
    gc.collect()
    assert _machine.driver.live_execs() == 0
    assert _machine.driver.live_events() == 0
    assert _machine.driver.context_depth() == 0
    _bridge.set_graph_limit(64)
