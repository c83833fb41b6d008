"""An import of torchcall that cannot work gives one error, which names the command that helps."""

import shutil
import struct
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
    install(changes, tmp_path)
    last = error_of(["-c", "import torchcall; torchcall.load"], tmp_path)
    assert last.startswith("torchcall: ")
    for part in parts:
        assert part in last


@pytest.mark.parametrize(
    "changes",
    [{"torch": None}, {"jax": None}, {"jax": "__version__ = '0.7.2'"}],
    ids=["no torch", "no jax", "old jax"],
)
def test_every_way_into_the_package_gives_the_same_error(changes, tmp_path):
    install(changes, tmp_path)
    expected = error_of(["-c", "import torchcall; torchcall.load"], tmp_path)
    assert expected.startswith("torchcall: ")
    ways = [["-c", f"import torchcall.{name}"] for name in ("mliap", "models.mace")]
    ways += [["-c", f"import torchcall.integrations.{name}"] for name in ("jax_md", "ase", "kups")]
    ways += [["-m", "torchcall", "md"]]
    for way in ways:
        assert error_of(way, tmp_path) == expected, way


@pytest.mark.parametrize("way", [["-c", "import torchcall; torchcall.load"], ["-m", "torchcall"]])
def test_an_incomplete_bridge_is_an_error(way, tmp_path):
    """Loading it would end the process by a signal."""
    install({}, tmp_path)
    # The first bytes of a library whose section headers, its last part, end at byte 6560.
    start = b"\x7fELF\2\1" + bytes(34) + struct.pack("<Q10x2H2x", 6400, 40, 4)
    (tmp_path / "torchcall" / "_bridge.broken.so").write_bytes(start + bytes(100))
    if way[0] == "-m":
        report = subprocess.run(
            [sys.executable, "-S", *way, "doctor"], cwd=tmp_path, capture_output=True, text=True
        )
        assert report.returncode == 1, report.stderr
        text = report.stdout
    else:
        text = error_of(way, tmp_path)
    assert "_bridge.broken.so: expected 6560 bytes, got 164: the file is incomplete" in text
    assert "`pip install --force-reinstall --no-deps torchcall`" in text


def install(changes, folder):
    """A copy of the package, and modules in the place of those that it needs."""
    shutil.copytree(
        PACKAGE, folder / "torchcall", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__")
    )
    (folder / "torchcall" / "_bridge.broken.so").touch()
    for name, text in (GOOD | changes).items():
        if text is not None:
            (folder / f"{name}.py").write_text(text)


def error_of(arguments, folder):
    # Without site-packages: only the modules of the folder.
    done = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stderr.rsplit("ImportError: ", 1)[-1]
