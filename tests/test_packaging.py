"""What a wheel contains: the files that CMake installs."""

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
