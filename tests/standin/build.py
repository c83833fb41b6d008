"""Builds the simulation libraries into `build/standin`, apart from the package's own build.

    python tests/standin/build.py

The package's CMake project does not know these libraries, so no wheel can contain them.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


def build(name: str) -> Path:
    """Builds the library "cuda" or "torch_cuda" if its sources are newer, and returns its path.

    Raises:
        RuntimeError: the compiler fails.
    """
    sources = {"cuda": "cuda_driver.cc", "torch_cuda": "torch_device.cc"}
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    folder = HERE.parents[1] / "build" / "standin" / importlib.metadata.version("torch")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lib{name}_standin.so"
    newest = max(file.stat().st_mtime for file in HERE.iterdir() if file.suffix in (".cc", ".h"))
    with FileLock(f"{path}.lock"):
        if path.exists() and path.stat().st_mtime > newest:
            return path
        # `dlopen("libcuda.so.1")` finds a loaded library by this name.
        options = ["-Wl,-soname,libcuda.so.1"]
        if name == "torch_cuda":
            libraries = [torch / "lib" / f"lib{library}.so" for library in ("c10", "torch_cpu")]
            options = ["-isystem", torch / "include", "-Wl,--no-undefined", *libraries]
        compiler = os.environ.get("CXX", "c++")
        done = subprocess.run(
            [compiler, *FLAGS, "-shared", HERE / sources[name], *options, "-o", path],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{compiler} fails for {sources[name]}:\n{done.stderr}")
    return path


if __name__ == "__main__":
    for library in ("cuda", "torch_cuda"):
        print(f"torchcall: simulation library for tests: {build(library)}", flush=True)
