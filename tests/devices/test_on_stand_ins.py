"""Calls on CUDA devices without a GPU: the driver and torch's device are played, see machine.py."""

from pathlib import Path

from standin.torch_device import run_tests

FILES = ("calls.py", "replays.py", "refusals.py", "attempts.py", "lifetimes.py")


def test_calls_and_replays_on_stand_ins():
    folder = Path(__file__).parent
    run_tests(*(folder / name for name in FILES))
