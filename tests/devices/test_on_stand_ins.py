"""Calls on CUDA devices without a GPU: the driver and torch's device are played, see machine.py."""

from pathlib import Path

import pytest
from standin.torch_device import run_tests


@pytest.mark.parametrize("file", ["calls.py", "replays.py"])
def test_on_stand_ins(file):
    run_tests(Path(__file__).parent / file)
