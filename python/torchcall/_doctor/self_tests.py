"""A small call of each engine, a neighbour list and an export, each timed."""

import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchcall._doctor.cpu import processor_flags
from torchcall._doctor.report import Section, one_line
from torchcall._doctor.versions import version
from torchcall._requirements import REBUILD

LABELS = {
    "torchscript": "TorchScript",
    "eager": "eager",
    "package": "package",
    "neighbor_list": "neighbour list",
    "export": "export",
    "cuda_driver": "CUDA driver",
    "torchscript_cuda": "TorchScript on CUDA",
    "eager_cuda": "eager on CUDA",
}
_COMPILE = "torchcall doctor --compile"
_PROGRAM = "#include <omp.h>\n#include <vector>\nint cores() { return omp_get_num_procs(); }\n"


class Untested(Exception):
    """Why a test was not run, which is not a fault."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def probe(section: Section, *, compile: bool) -> None:
    """Runs each test; a failure is a problem, and does not prevent the next test.

    Args:
        section: Gets the report.
        compile: Whether to compile the test's package again.
    """
    if "torchcall._loaded" not in sys.modules:
        for name in LABELS:
            section.values[name] = {"status": "untested", "seconds": 0.0, "detail": ""}
        section.show("untested", "the torch half is not loaded")
        return
    calls: Any = importlib.import_module("torchcall._doctor.calls")
    _run(section, "torchscript", calls.torchscript, REBUILD)
    _run(section, "eager", calls.eager, REBUILD)
    _run(section, "package", lambda: _package(calls, compile), _COMPILE)
    _run(section, "neighbor_list", calls.neighbor_list, REBUILD)
    _run(section, "export", lambda: _export(calls), "pip install --upgrade jax jaxlib flatbuffers")
    if calls.has_cuda():
        _run(section, "cuda_driver", calls.cuda_driver, "nvidia-smi  # fails, too: see its message")
        _run(section, "torchscript_cuda", lambda: calls.torchscript("gpu"), REBUILD)
        _run(section, "eager_cuda", lambda: calls.eager("gpu"), REBUILD)


def _run(section: Section, name: str, test: Callable[[], str], remedy: str) -> None:
    start = time.perf_counter()
    status = "ok"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of TorchScript
            detail = test()
    except Untested as reason:
        status, detail = "untested", str(reason)
        section.note(f"{LABELS[name]}: {detail}", reason.remedy)
    except (Exception, SystemExit) as error:
        status, detail = "failed", one_line(error)
        section.problem(f"{LABELS[name]}: {detail}", remedy)
    seconds = time.perf_counter() - start
    section.values[name] = {"status": status, "seconds": round(seconds, 3), "detail": detail}
    text = "FAILED" if status == "failed" else status
    section.show(LABELS[name], f"{text}, {seconds:.2f} s" + (f" ({detail})" if detail else ""))


def _export(calls: Any) -> str:
    if importlib.util.find_spec("flatbuffers") is None:
        raise Untested("serialising needs flatbuffers", "pip install flatbuffers")
    return calls.export()


def _package(calls: Any, compile: bool) -> str:
    path = package_path()
    if path.exists() and not compile:
        calls.package(path)
        return "compiled earlier"
    compiler = working_compiler()
    if not compile:
        raise Untested(f"none compiled yet; {compiler} compiles and links a test program", _COMPILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    calls.write_package(path)
    seconds = time.perf_counter() - start
    calls.package(path)
    return f"compiled in {seconds:.0f} s"


def package_path() -> Path:
    """Where the package of the test is. Each processor has its own: it has native code."""
    parts = [version("torch"), version("torchcall"), platform.machine(), *sorted(processor_flags())]
    key = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
    folder: Any = importlib.import_module("torchcall._compile._folder")
    return folder.cache_folder() / f"doctor-{key}.pt2"


def working_compiler() -> str:
    """The path of the C++ compiler that packages are compiled with, after a test program.

    Raises:
        Untested: There is none, or it cannot compile and link with OpenMP.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name)
    unset = "unset CXX" if "CXX" in os.environ else None
    install = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    if path is None:
        raise Untested(
            f"compiling needs a C++ compiler, and {name} is not found; packages that were compiled "
            "on such a processor run",
            unset or f"{install}  # or: conda install gxx",
        )
    with tempfile.TemporaryDirectory(prefix="torchcall-doctor-") as folder:
        source = Path(folder) / "test.cc"
        source.write_text(_PROGRAM)
        openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        command = [path, "-std=c++20", "-fPIC", "-shared", *openmp, "test.cc", "-o", "test.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise Untested(f"{path} does not compile: {lines[0].strip()}", unset or install)
    return path
