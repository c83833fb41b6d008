"""An import of torchcall that cannot work gives one error, which names the command that helps."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchcall

PACKAGE = Path(torchcall.__file__).parent
GOOD = {"jaxlib": "__version__ = '0.10.2'", "jax": "__version__ = '0.10.2'", "torch": ""}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"torch": None}, ["torch is not installed", "`pip install 'torch>=2.11,<2.16'`"]),
        ({"jax": None}, ["jax is not installed", "`pip install 'jax>=0.8.1'`"]),
        ({"jaxlib": None}, ["jaxlib is not installed", "`pip install 'jax>=0.8.1'`"]),
        (
            {"jax": "__version__ = '0.7.2'"},
            ["expected jax 0.8.1 or newer, got jax 0.7.2", "pip install --upgrade 'jax>=0.8.1'"],
        ),
        (
            {"jaxlib": "__version__ = '0.8.0'"},
            ["expected jaxlib 0.8.1 or newer, got jaxlib 0.8.0", "`pip install --upgrade"],
        ),
        (
            {"torch": "raise OSError('libgomp.so.1: no such file')"},
            ["torch cannot be imported", "libgomp.so.1", "`pip install 'torch"],
        ),
        ({}, ["cannot load torchcall._bridge", "_bridge.broken.so", "`pip install --force"]),
    ],
    ids=[
        "no torch", "no jax", "no jaxlib", "old jax", "old jaxlib", "damaged torch", "no bridge",
    ],
)  # fmt: skip
def test_import_error_names_the_cause_and_the_remedy(changes, parts, tmp_path):
    package = tmp_path / "torchcall"
    package.mkdir()
    for name in ("__init__.py", "_loaded.py", "_requirements.py"):
        shutil.copy(PACKAGE / name, package)
    (package / "_bridge.broken.so").touch()
    for name, text in (GOOD | changes).items():
        if text is not None:
            (tmp_path / f"{name}.py").write_text(text)
    # Without site-packages: only the modules above.
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import torchcall; torchcall.load"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.rsplit("ImportError: ", 1)[-1]
    assert last.startswith("torchcall: ")
    for part in parts:
        assert part in last
