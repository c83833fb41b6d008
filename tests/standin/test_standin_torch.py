"""The torch stand-in: tensors on "cuda:i" without a GPU, in a process of its own."""

from pathlib import Path

import torch
from standin.torch_device import run_tests


def test_the_stand_in_computes_what_the_cpu_does_captures_and_replays():
    folder = Path(__file__).parent
    run_tests(folder / "device_operators.py", folder / "device_graphs.py")


def test_this_process_has_no_stand_in():
    assert torch.accelerator.current_accelerator() is None
