"""Checks that a wheel holds what it should, and prints its size and hash.

python packaging/check_wheel.py dist/*.whl
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

LARGEST = 8_000_000
SYSTEM = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libgcc_s.so.1", "libstdc++.so.6",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip
TORCH = {"libc10.so", "libtorch_cpu.so"}
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
TAGS = r"-(cp311-cp311|cp312-abi3)-manylinux_2_28_(x86_64|aarch64)\.whl"


def library_faults(path: Path, name: str) -> list[str]:
    """What is wrong with one library: libraries it links, symbol versions, exported symbols."""

    def readelf(option: str) -> str:
        return subprocess.run(
            ["readelf", "-W", option, path], capture_output=True, text=True, check=True
        ).stdout

    faults = []
    is_half = "/lib/torch-" in name
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf("-d")))
    if needed - SYSTEM != (TORCH if is_half else set()):
        faults.append(f"{name} links {sorted(needed - SYSTEM)}")
    for family, version in set(re.findall(r"Name: ([A-Z]+)_([\d.]+)", readelf("-V"))):
        if tuple(map(int, version.split("."))) > NEWEST.get(family, (99,)):
            faults.append(f"{name} needs {family}_{version}, newer than manylinux_2_28's")
    exported = {
        line.split()[-1]
        for line in readelf("--dyn-syms").splitlines()[3:]
        if line.split()[4] in ("GLOBAL", "WEAK") and line.split()[6] != "UND"
    }
    expected = {"torchcall_engine_api"} if is_half else {"PyInit__bridge"}
    if exported != expected:
        faults.append(f"{name} exports {sorted(exported)[:5]}, expected {sorted(expected)}")
    return faults


def check(wheel: Path, whole: bool = True) -> None:
    """Exits with every fault. A wheel that is not whole may lack torch halves."""
    faults = []
    if not re.search(TAGS, wheel.name):
        faults.append(f"unexpected tags in {wheel.name}")
    size = wheel.stat().st_size
    if size > LARGEST:
        faults.append(f"{size} bytes, more than {LARGEST}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
        for name in libraries:
            faults += library_faults(Path(archive.extract(name, folder)), name)
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        requirements = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    bridge = "_bridge.abi3.so" if "abi3" in wheel.name else "_bridge.cpython-311"
    halves = {
        int(found[1])
        for name in libraries
        if (found := re.fullmatch(r"torchcall/lib/torch-2\.(\d+)/libtorchcall_torch\.so", name))
    }
    if len(libraries) != len(halves) + 1:
        faults.append(f"other libraries than the bridge and the torch halves: {libraries}")
    if not any(name.startswith(f"torchcall/{bridge}") for name in libraries):
        faults.append(f"no {bridge} among {libraries}")
    if not any(re.search(r"\.dist-info/sboms/.*\.json$", name) for name in names):
        faults.append("no list of components in dist-info/sboms")
    if junk := [n for n in names if re.search(r"standin|/tests?/|\.(cc|h|o|a|pyc)$", n)]:
        faults.append(f"files that do not belong into a wheel: {junk[:5]}")
    (torch,) = [text for text in requirements if re.match(r"torch\b", text)]
    low, high = (int(re.search(rf"{op}2\.(\d+)", torch)[1]) for op in (">=", "<"))  # type: ignore[index]
    claimed = set(range(low, high))
    if not halves or (claimed != halves if whole else not halves <= claimed):
        faults.append(f"requires {torch}, has halves for 2.{sorted(halves)}")
    if faults:
        sys.exit("\n".join(f"torchcall: {wheel.name}: {fault}" for fault in faults))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    minors = ", ".join(f"2.{minor}" for minor in sorted(halves))
    print(f"torchcall: {wheel}: torch {minors}; {size / 1e6:.2f} MB; sha256 {digest}", flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
