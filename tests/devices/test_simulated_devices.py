"""Calls on simulated CUDA devices, in one process of their own: see machine.py."""

from pathlib import Path

import pytest
import torch
from standin.torch_device import run_tests

FILES = ("calls.py", "replays.py", "refusals.py", "attempts.py", "lifetimes.py", "packages.py")


@pytest.fixture(scope="module")
def failures():
    if torch.version.cuda is not None:
        pytest.skip("torch with CUDA asks for its driver; a CPU build of torch gets the devices")
    return run_tests(*(Path(__file__).parent / name for name in FILES))


@pytest.mark.parametrize("file", FILES)
def test_calls_on_simulated_devices(failures, file):
    if failures[file]:
        pytest.fail("\n\n".join(failures[file]), pytrace=False)
