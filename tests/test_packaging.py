"""What a wheel contains: the files that CMake installs."""

import json
import re
from pathlib import Path

import pytest
import torch

from torchcall import _bridge


def test_cmake_installs_the_two_libraries_and_the_examples_only():
    """An editable build and a wheel share the CMake project and its build folder."""
    library = Path(_bridge.__file__)  # <build folder>/install/platlib/torchcall/_bridge.*.so
    script = library.parents[3] / "cmake_install.cmake"
    if not script.exists():
        pytest.skip("not an editable install")
    pattern = r'file\(INSTALL DESTINATION "\$\{CMAKE_INSTALL_PREFIX\}/([^"]*)" .*FILES "([^"]*)"\)'
    # The torch half is a subdirectory of the CMake project.
    half = script.parent / "csrc" / "torch" / "cmake_install.cmake"
    text = script.read_text() + half.read_text()
    installed = re.findall(pattern, text)
    assert len(installed) == text.count("file(INSTALL")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert {folder: Path(source).name.split(".")[0] for folder, source in installed} == {
        "torchcall": "_bridge",
        f"torchcall/lib/torch-{minor}": "libtorchcall_torch",
        "torchcall/examples": "examples",
    }
    assert len(installed) == 3


def test_the_list_of_components_names_the_code_that_is_compiled_in(monkeypatch, tmp_path):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "packaging")
    sbom = __import__("sbom")
    path = sbom.write(tmp_path / "sboms" / "a.json", "0.1.0", "3.1.0", "0.8.1", ["2.11.0"])
    found = json.loads(path.read_text())
    assert found["metadata"]["component"]["purl"] == "pkg:pypi/torchcall@0.1.0"
    purls = [part["purl"] for part in found["components"] if "purl" in part]
    assert purls == ["pkg:pypi/nanobind@3.1.0", "pkg:pypi/jaxlib@0.8.1", "pkg:pypi/torch@2.11.0"]
    licences = (root / "licenses" / "README.md").read_text()
    rows = re.findall(r"^\|.*\| ([A-Za-z0-9.-]+), .*\|$", licences, re.MULTILINE)
    listed = [part["licenses"][0]["license"]["id"] for part in found["components"]]
    assert listed == rows
