"""The native libraries: selection of the torch half."""

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from models import error_of, run_python

from torchcall import _native
from torchcall._loaded import _bridge

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


IMPORTS = """
    import json, os, sys
    import jax, torch

    messages = []
    for version, half in json.load(open("cases.json")):
        torch.__version__ = version
        os.environ["TORCHCALL_TORCH_HALF"] = half
        try:
            import torchcall

            torchcall.load
        except ImportError as error:
            messages.append(str(error))
        else:
            sys.exit(f"torch {version} with {half or 'its own half'} is accepted")
    print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def import_errors(tmp_path_factory):
    """The messages of imports that fail, by the case's name. All are tried in one process."""
    folder = tmp_path_factory.mktemp("imports")
    text = folder / "text.so"
    text.write_text("not a library")
    half = str(_native.find_torch_half(torch.__version__, _native.library_root()))
    start = folder / "start.so"
    start.write_bytes(Path(half).read_bytes()[:300_000])
    older = folder / "older.so"  # needs a function that the installed torch does not have
    source = "namespace at { void gone(); } void (*gone)() = at::gone;"
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-xc++", "-", "-o", older], input=source, text=True, check=True
    )
    cases = {
        "another torch": ("2.99.1+cpu", ""),
        "another torch, half named": ("2.99.1+cpu", half),
        "missing": (torch.__version__, "/nowhere/half.so"),
        "text": (torch.__version__, str(text)),
        "incomplete": (torch.__version__, str(start)),
        "replaced torch": (torch.__version__, str(older)),
        "another library": (torch.__version__, "libm.so.6"),
    }
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    messages = json.loads(run_python(folder, IMPORTS).stdout)
    return dict(zip(cases, messages, strict=True))


def test_import_with_another_torch_is_an_error_naming_both(import_errors):
    message = import_errors["another torch"]
    assert message.startswith("torchcall: expected torch ")
    built_for = ".".join(torch.__version__.split(".")[:2])
    assert built_for in message
    assert "2.99.1+cpu" in message


def test_a_torch_half_of_another_minor_is_refused_even_when_named(import_errors):
    half = _native.find_torch_half(torch.__version__, _native.library_root())
    message = import_errors["another torch, half named"]
    assert message.startswith(f"torchcall: {half}: expected a library built for torch 2.99")
    assert f"got one built for torch {_bridge.torch_half_version()}" in message


def test_a_missing_torch_half_is_an_error_with_likely_causes(import_errors):
    message = import_errors["missing"]
    assert message.startswith("torchcall: cannot load /nowhere/half.so with torch ")
    assert "Likely causes" in message


def test_a_torch_half_that_is_no_library_is_an_error(import_errors):
    message = import_errors["text"]
    assert message.startswith("torchcall: cannot load ")
    assert "text.so" in message


def test_an_incomplete_torch_half_is_an_error(import_errors):
    """Loading it would end the process."""
    message = import_errors["incomplete"]
    assert re.search(r"start.so: expected \d{6,} bytes, got 300000", message)
    assert "`pip install --force-reinstall --no-deps torchcall`" in message


def test_a_torch_that_was_replaced_by_a_build_that_lacks_a_function_is_an_error(import_errors):
    message = import_errors["replaced torch"]
    assert message.startswith("torchcall: cannot load ")
    loaded = f"older.so with torch {torch.__version__} in {Path(torch.__file__).parent}: "
    assert loaded in message
    assert "undefined symbol: _ZN2at4goneEv" in message
    assert "torch was replaced" in message
    assert "Install torchcall again: `pip install --force-reinstall --no-deps" in message


def test_a_torch_that_replaced_another_minor_gets_its_own_half(library_root):
    """A wheel has a half for each minor version of torch."""
    chosen = [_native.find_torch_half(v, library_root).parent.name for v in ("1.98.0", "1.99.1")]
    assert chosen == ["torch-1.98", "torch-1.99"]


def test_a_library_without_the_entry_point_is_an_error(import_errors):
    message = import_errors["another library"]
    assert message.startswith("torchcall: cannot load libm.so.6 ")
    assert "torchcall_engine_api" in message


# The tests themselves import JAX first.
@pytest.mark.parametrize("order", ["torch, jax, torchcall", "torchcall"])
def test_order_of_imports_makes_no_difference(order, tmp_path):
    code = f"import {order}\nreport = torchcall.doctor()\nassert report['ok'], report['problems']"
    run_python(tmp_path, code, fresh=True)


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
