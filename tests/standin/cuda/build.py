"""Builds the libraries that play CUDA for the torch and JAX of this Python.

What torch's CUDA build and JAX's CUDA plugin ask of CUDA and is not played answers that it is not
supported: the names are read out of their libraries.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-fPIC"]
WARNINGS = ["-Wall", "-Wextra"]
DRIVER = "libcuda.so.1"
RUNTIME = "libcudart.so.13"
MANAGEMENT = "libnvidia-ml.so.1"
OPERATORS = "libtorch_operators.so"
NOT_SUPPORTED = {DRIVER: 801, RUNTIME: 801, MANAGEMENT: 3}


def build(into: Path) -> None:
    """Compiles what is not there or older than its source."""
    into.mkdir(parents=True, exist_ok=True)
    torch, cuda, plugin = _package("torch"), _package("nvidia") / "cu13", _plugin()
    cpp = [option for folder in headers() for option in ("-isystem", folder)]
    names = _names(plugin)
    torchs = [
        torch / "lib" / f"lib{name}.so" for name in ("c10_cuda", "torch_cuda", "torch_python")
    ]
    torchs += (torch / "lib").glob("libtorch_cuda_linalg.so")
    runtimes = {name for path in torchs for name in _undefined(path)} | _defined(
        cuda / "lib" / RUNTIME
    )
    with ThreadPoolExecutor() as pool:
        own = {path.stem: path for path in HERE.glob("*.cc") if path.stem != "torch_operators"}
        compiled = dict(
            zip(own, pool.map(lambda p: _compiled(p, into, cpp), own.values()), strict=True)
        )
    driver = [path for stem, path in compiled.items() if stem not in ("runtime", "nvml")]
    _linked(into, DRIVER, driver, [n for n in names if re.match("cu[A-Z][a-z]", n)])
    _linked(into, MANAGEMENT, [compiled["nvml"]], [n for n in names if n.startswith("nvml")])
    version = into / "runtime.map"
    version.write_text(f"{RUNTIME} {{ *; }};\n")
    _linked(
        into, RUNTIME, [compiled["runtime"]], runtimes,
        "-L", str(into), f"-l:{DRIVER}", f"-Wl,--version-script={version}",
    )  # fmt: skip
    _operators(into, torch, cpp)

    for name in (DRIVER, RUNTIME):  # as linkers look for them
        link = into / name[: name.index(".so") + 3]
        link.unlink(missing_ok=True)
        link.symlink_to(name)


def headers() -> list[str]:
    """CUDA's: of the packages nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl."""
    folder = _package("nvidia") / "cu13" / "include"
    if not (folder / "crt").is_dir() or not (folder / "cccl").is_dir():
        raise SystemExit("expected the packages nvidia-cuda-crt and nvidia-cuda-cccl, found none")
    return [str(folder), str(folder / "cccl")]


def _operators(into: Path, torch: Path, cpp: list[str]) -> None:
    library, source = into / OPERATORS, HERE / "torch_operators.cc"
    if not _is_old(library, [source, *HERE.glob("*.h"), *HERE.parent.glob("*.h")]):
        return
    headers = torch / "include"
    _run(
        *COMPILER, "-shared", *cpp, "-I", str(HERE.parent), "-isystem", str(headers),
        "-isystem", str(headers / "torch" / "csrc" / "api" / "include"), str(source),
        "-o", str(library), "-L", str(torch / "lib"),
        "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda",
        "-L", str(into), f"-l:{DRIVER}", f"-l:{RUNTIME}",
    )  # fmt: skip


def _compiled(source: Path, into: Path, cpp: list[str]) -> Path:
    made = into / f"{source.stem}.o"
    if _is_old(made, [source, *HERE.glob("*.h")]):
        # The interpreter of kernels rounds as it is told, and should be fast.
        kernels = ["-O2", "-frounding-math"] if source.stem.startswith("ptx") else []
        _run(*COMPILER, *WARNINGS, *kernels, *cpp, "-c", str(source), "-o", str(made))
    return made


def _linked(
    into: Path, name: str, objects: list[Path], asked: Iterable[str], *options: str
) -> None:
    """The library, with an answer for each function asked for that its objects lack."""
    if not _is_old(into / name, objects):
        return
    have = {symbol for path in objects for symbol in _symbols(path, "--defined-only")}
    rest = into / f"{name}.rest.c"
    lines = [
        f"int {missing}(void) {{ return {NOT_SUPPORTED[name]}; }}"
        for missing in sorted(set(asked) - have)
    ]
    rest.write_text("\n".join(lines) + "\n")
    _run(
        shutil.which("gcc") or "cc", "-fPIC", "-w", "-fno-builtin", "-c", str(rest),
        "-o", str(rest.with_suffix(".o")),
    )  # fmt: skip
    _run(
        *COMPILER, "-shared", *map(str, objects), str(rest.with_suffix(".o")),
        "-o", str(into / name), f"-Wl,-soname,{name}", *options,
    )  # fmt: skip


def _is_old(made: Path, sources: Iterable[Path]) -> bool:
    return not made.exists() or any(path.stat().st_mtime > made.stat().st_mtime for path in sources)


def _names(library: Path) -> list[str]:
    """Text in a library that looks like the name of a function of the driver or of its tools."""
    found = set(re.findall(rb"\0((?:cu[A-Z][a-z]|nvml[A-Z])\w+)(?=\0)", library.read_bytes()))
    return sorted(name.decode() for name in found if not name.endswith((b"_ptsz", b"_ptds")))


def _symbols(library: Path, *options: str) -> set[str]:
    done = subprocess.run(
        ["nm", *options, str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()}


def _undefined(library: Path) -> set[str]:
    symbols = _symbols(library, "-D", "--undefined-only")
    return {name for name in symbols if re.match("(__)?cuda[A-Z]", name)}


def _defined(library: Path) -> set[str]:
    symbols = _symbols(library, "-D", "--defined-only")
    return {name for name in symbols if re.match("(__)?cuda[A-Z]", name)}


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"expected {name} to be installed, with CUDA 13")
    return Path(next(iter(spec.submodule_search_locations)))


def _plugin() -> Path:
    return _package("jax_plugins") / "xla_cuda13" / "xla_cuda_plugin.so"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
