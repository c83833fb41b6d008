"""Packages on simulated devices. They load there but do not run. Run by test_simulated_devices.py.

Their library is compiled for the CPU, and their metadata names CUDA.
"""

import os
import zipfile

import numpy as np
import pytest
import torch
from models import Scale

import torchcall

X = np.ones(3, np.float32)
CHANGED = "expected the file that was loaded first, got one that changed since; call refresh()"


def compile_for_cuda(factor, path):
    made = torchcall.compile(Scale(factor), path, example=(X,), dynamic=False)
    with zipfile.ZipFile(made) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("_metadata.json"):
                device = b'"AOTI_DEVICE_KEY": "cpu"'
                assert device in data
                data = data.replace(device, device.replace(b"cpu", b"cuda"))
            archive.writestr(name, data)
    return path


def test_a_further_device_never_gets_the_weights_of_another_file(machine, tmp_path, monkeypatch):
    # torch's compiler would ask for the device's properties, which nothing simulates.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = compile_for_cuda(2.0, tmp_path / "model.pt2")
    other = compile_for_cuda(3.0, tmp_path / "other.pt2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    f = torchcall.load(path)

    def error_on_device(ordinal):
        with pytest.raises(RuntimeError) as caught:
            machine.call(f, X, ordinal=ordinal)
        return str(caught.value)

    does_not_run = error_on_device(0)
    assert CHANGED not in does_not_run
    os.replace(other, path)
    assert CHANGED in error_on_device(1)
    assert error_on_device(0) == does_not_run  # loaded before
    f.refresh()
    assert error_on_device(1) == does_not_run
    path.unlink()  # all devices have loaded it
    assert error_on_device(1) == does_not_run
    assert error_on_device(0) == does_not_run
