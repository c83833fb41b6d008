"""The native libraries: selection of the torch half, `doctor`, and the command line."""

import ctypes
import re
import subprocess
import sys

import jax
import jaxlib
import pytest
import torch
from models import error_of, run_python

import torchcall
from torchcall import _bridge, _native
from torchcall.__main__ import main

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def library_root(tmp_path):
    """A library folder with empty torch halves for two minor versions that do not exist."""
    for minor in ("1.98", "1.99"):
        folder = tmp_path / "lib" / f"torch-{minor}"
        folder.mkdir(parents=True)
        (folder / "libtorchcall_torch.so").touch()
    return tmp_path


def test_torch_half_is_chosen_by_the_minor_version(library_root):
    for version in ("1.98.0", "1.98.7+cpu", "1.98.0a0+git1234", "1.98"):
        path = _native.find_torch_half(version, library_root)
        assert path == library_root / "lib" / "torch-1.98" / "libtorchcall_torch.so"


def test_each_platform_has_its_own_state_type():
    """Each platform's XLA is a separate library that assigns its own type ids."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ids = {address(_bridge.state_type(name)["type_id"], None) for name in ("cpu", "CUDA")}
    assert len(ids) == 2


@pytest.mark.parametrize("version", ["1.97.0", "1.9.8", "2.99.0+cu130", "1.980.0"])
def test_other_torch_minor_is_refused_with_an_error_that_names_both_versions(version, library_root):
    text = error_of(lambda: _native.find_torch_half(version, library_root))
    assert "1.98 or 1.99" in text
    assert f"got torch {version}" in text


def test_missing_torch_halves_are_an_error(tmp_path):
    text = error_of(lambda: _native.find_torch_half("1.98.0", tmp_path))
    assert "got torch 1.98.0" in text


FAKE_TORCH = """
    import torch
    torch.__version__ = "2.99.1+cpu"
    try:
        import torchcall
    except ImportError as error:
        print(type(error).__name__, error)
    else:
        print("imported")
"""


def test_import_with_another_torch_is_an_import_error_that_names_both_versions(tmp_path):
    printed = run_python(tmp_path, FAKE_TORCH).stdout
    assert printed.startswith("ImportError torchcall: expected torch ")
    built_for = ".".join(torch.__version__.split(".")[:2])
    assert built_for in printed
    assert "2.99.1+cpu" in printed


def test_torch_half_of_another_minor_is_refused_even_when_selected_explicitly(tmp_path):
    half = _native.find_torch_half(torch.__version__, _native.library_root())
    printed = run_python(tmp_path, FAKE_TORCH, TORCHCALL_TORCH_HALF=str(half)).stdout
    assert printed.startswith(
        f"ImportError torchcall: {half}: expected a library built for torch 2.99"
    )
    assert f"got one built for torch {_bridge.torch_half_version()}" in printed


TRY_IMPORT = """
    try:
        import torchcall
    except ImportError as error:
        print(error)
    else:
        print("imported")
"""


def test_torch_half_that_does_not_exist_is_an_import_error(tmp_path):
    printed = run_python(tmp_path, TRY_IMPORT, TORCHCALL_TORCH_HALF="/nowhere/half.so").stdout
    assert printed.startswith("torchcall: cannot load /nowhere/half.so with torch ")
    assert "Likely causes" in printed


def test_torch_half_that_is_not_a_library_is_an_import_error(tmp_path):
    half = tmp_path / "half.so"
    half.write_text("not a library")
    printed = run_python(tmp_path, TRY_IMPORT, TORCHCALL_TORCH_HALF=str(half)).stdout
    assert printed.startswith(f"torchcall: cannot load {half}")


def test_library_without_the_entry_point_is_an_import_error(tmp_path):
    printed = run_python(tmp_path, TRY_IMPORT, TORCHCALL_TORCH_HALF="libm.so.6").stdout
    assert printed.startswith("torchcall: cannot load libm.so.6 ")
    assert "torchcall_engine_api" in printed


@pytest.mark.parametrize("order", ["jax, torch, torchcall", "torch, jax, torchcall", "torchcall"])
def test_order_of_imports_makes_no_difference(order, tmp_path):
    code = f"import {order}\nassert all('FAILED' not in v for v in torchcall.doctor().values())"
    run_python(tmp_path, code)


def test_neither_half_links_the_libraries_of_the_other():
    def needs(path):
        listing = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
        return set(re.findall(r"NEEDED.*\[(.*)\]", listing))

    half = _native.find_torch_half(torch.__version__, _native.library_root())
    bridge_needs, half_needs = needs(_bridge.__file__), needs(str(half))
    if not bridge_needs:
        pytest.skip("readelf is not installed")
    assert not [name for name in bridge_needs if "torch" in name or "c10" in name]
    assert not [n for n in half_needs if "python" in n or "cuda" in n or "xla" in n or "jax" in n]
    assert any("torch_cpu" in name for name in half_needs)


def test_doctor_reports_versions_and_a_passed_self_test(capsys):
    report = torchcall.doctor()
    printed = capsys.readouterr().out
    text = " ".join(report.values())
    for part in (torchcall.__version__, jax.__version__, jaxlib.__version__, torch.__version__):
        assert part in text
        assert part in printed
    assert str(_native.find_torch_half(torch.__version__, _native.library_root())) in text
    assert report["TorchScript on the CPU"] == "ok"
    assert not [value for value in report.values() if "FAILED" in value]
    assert all(name in printed for name in report)


def test_doctor_reports_failures_without_raising(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("the bridge is broken\nsecond line")

    monkeypatch.setattr(_bridge.Model, "from_live", broken)
    report = torchcall.doctor()
    assert "FAILED" in report["TorchScript on the CPU"]
    assert "the bridge is broken" in capsys.readouterr().out
    assert main(["doctor"]) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_command_line_shows_its_usage(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m torchcall")
    assert "demo" in printed
    assert "doctor" in printed


def test_command_line_runs_the_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "ok" in capsys.readouterr().out


def test_unknown_command_is_an_error_with_the_usage(capsys):
    assert main(["dcotor"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("torchcall: expected the command demo, compile or doctor, got")
    assert "usage:" in printed.err


def test_command_line_works_as_a_program():
    command = [sys.executable, "-m", "torchcall", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
