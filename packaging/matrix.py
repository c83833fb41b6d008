"""Runs the tests on the wheels in `dist/`, with other versions of Python, torch and jax.

    make test-matrix                                   every cell
    make test-matrix CELLS="3.11-torch2.13-jax0.8.1"   some
    python packaging/matrix.py --table                 docs/compatibility.md from packaging/matrix/

A cell has an environment of its own and a copy of the tests outside this folder: the wheel is
tested, not the sources. Results are written to build/matrix; a cell that passed is not run again,
and one that was cut short goes on with the folders of tests that it has not finished. An
environment that KEEP=1 left in FOLDER is used again.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "matrix"
COMMITTED = ROOT / "packaging" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
BLOCK = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->)", re.DOTALL)
# The newest and the oldest JAX for each Python. JAX 0.11 and newer need Python 3.12.
CELLS = [
    "3.12-torch2.15-jax0.12.0.1",
    "3.13-torch2.11-jax0.12.0.1",
    "3.11-torch2.14-jax0.10.2",
    "3.12-torch2.12-jax0.8.1",
    "3.13-torch2.14-jax0.8.1",
    "3.11-torch2.13-jax0.8.1",
]
# With their dependencies; the others of md.txt come without, as for `make demo`.
TESTS = [
    "ase", "beartype", "filelock", "flatbuffers", "flax", "hypothesis", "jaxtyping", "matplotlib",
    "matscipy", "numpy", "optax", "platformdirs", "pytest", "pytest-xdist", "tqdm",
    "typing_extensions", "vesin",
]  # fmt: skip
# Not pinned as in constraints.txt: the cell gives the version, or pip finds one for its jax.
FREE = r"(torch|jax|jaxlib|flax|optax)=="
WITHOUT_DEPENDENCIES = ["wrap_torch2jax"]
# Not copied: the package's sources, what builds and tools leave, and hidden folders.
LEFT_OUT = ("python", "build", "dist", "__pycache__", ".git", ".venv*", ".*_cache", ".hypothesis")
SHOW = """
import json, platform, importlib.metadata, torchcall
names = ("torch", "jax", "jaxlib", "numpy", "torchcall")
found = {name: importlib.metadata.version(name) for name in names}
print(json.dumps({"python": platform.python_version(), **found, "from": torchcall.__file__}))
"""


class Failed(Exception):
    """The cell's environment cannot be made."""


class Cell:
    """Versions to test together; torch's may be a minor one."""

    def __init__(self, name: str) -> None:
        found = re.fullmatch(r"(3\.\d+)-torch(\d[\d.]*)-jax(\d[\d.]*)", name)
        if found is None:
            sys.exit(f"torchcall: expected a cell like 3.11-torch2.13-jax0.8.1, got {name}")
        self.name, (self.python, torch, jax) = name, found.groups()
        torch = f"{torch}.*" if torch.count(".") == 1 else torch
        self.pins = [f"torch=={torch}", f"jax=={jax}", f"jaxlib=={jax}"]


def say(text: str) -> None:
    print(f"torchcall: {text}", flush=True)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stderr}")


def interpreter(version: str) -> str | None:
    """The path of a Python of this version."""
    show = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    tries: list[tuple[str, dict[str, str]]] = [(sys.executable, {}), (f"python{version}", {})]
    if pyenv := shutil.which("pyenv"):  # its command fails for a version that is not selected
        listed = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True)
        wanted = [v for v in listed.stdout.split() if v.startswith(f"{version}.")]
        tries += [(f"python{version}", {"PYENV_VERSION": v}) for v in reversed(wanted)]
    for command, more in tries:
        if shutil.which(command) is None:
            continue
        env = {**os.environ, **more}
        done = subprocess.run([command, "-c", show], env=env, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.split()[0] == version:
            return done.stdout.split(maxsplit=1)[1].strip()
    return None


def wheel_for(python: str, folder: Path = ROOT / "dist") -> Path | None:
    """The folder's newest wheel for this version of Python."""
    minor = int(python.split(".")[1])
    abi = "cp312-abi3" if minor >= 12 else f"cp3{minor}-cp3{minor}"
    wheels = folder.glob(f"torchcall-*-{abi}-*{platform.machine()}.whl")
    return max(wheels, key=lambda path: path.stat().st_mtime, default=None)


def environment(cell: Cell, python: str, folder: Path) -> Path:
    """The interpreter of an environment without torchcall: a new one, or one that a run left."""
    made, requirements = folder / "environment", ROOT / "requirements"
    ours, ready = made / "bin" / "python", made / ".ready"
    pinned = folder / "constraints.txt"
    lines = (requirements / "constraints.txt").read_text().splitlines()
    others = [line for line in lines if not re.match(FREE, line)]
    pins = "\n".join(others + cell.pins) + "\n"
    if ready.exists() and pinned.read_text() == pins:
        return ours
    run(python, "-m", "venv", "--clear", made)
    pinned.write_text(pins)
    md = (requirements / "md.txt").read_text().splitlines()
    rest = [line for line in md if line and line[0] != "#" and not re.match(FREE, line)]
    pip = (ours, "-m", "pip", "install", "-q", "-c", pinned)
    run(*pip, *cell.pins, *TESTS)
    run(*pip, "--no-deps", *rest, *WITHOUT_DEPENDENCIES)
    ready.touch()
    return ours


def install(cell: Cell, python: str, wheel: Path, folder: Path) -> Path:
    """Makes the environment, and returns its interpreter."""
    ours = environment(cell, python, folder)
    run(ours, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    return ours


def versions(python: Path, where: Path) -> dict[str, str]:
    """What is installed; the imported torchcall must be the wheel's."""
    done = subprocess.run([python, "-c", SHOW], cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"import torchcall fails\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "site-packages" not in (path := found.pop("from")):
        raise Failed(f"torchcall is imported from {path}, not from the wheel")
    return found


def parts(copy: Path, tests: list[str]) -> dict[str, list[str]]:
    """What is run one after the other, by name, so that a cell that was cut short goes on there."""
    if tests:
        return {"selection": tests}
    found: dict[str, list[str]] = {}
    for path in sorted((copy / "tests").rglob("test_*.py")):
        file = path.relative_to(copy)
        folder = file.parts[1]
        # Files beside the folders are divided by their first letters.
        name = folder if len(file.parts) > 2 else "to-m" if path.stem < "test_n" else "from-n"
        found.setdefault(name, []).append(str(file))
    return found


def run_tests(
    python: Path, folder: Path, reports: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs pytest in a copy of the tests, without the parts that have a report."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    found = versions(python, copy)
    say(", ".join(f"{name} {version}" for name, version in found.items()))
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "XLA_FLAGS")}
    reports.mkdir(parents=True, exist_ok=True)
    for name, files in parts(copy, options.tests).items():
        report = reports / f"{name}.xml"
        if report.exists():
            say(f"{name}: its report is there")
            continue
        part = report.with_suffix(".part")
        done = subprocess.run(
            [
                python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", str(options.jobs),
                "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow",
                f"--junitxml={part}", *files,
            ],
            cwd=copy, env={**environment, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        # 5: nothing to run, as where the networks' packages are missing
        if done.returncode not in (0, 1, 5) or not part.exists():
            raise Failed(f"pytest ends with {done.returncode} in {name}")
        part.rename(report)
    return {"versions": found, **summary(sorted(reports.glob("*.xml")))}


def summary(reports: list[Path]) -> dict[str, Any]:
    """The results in pytest's reports."""
    roots = [xml.etree.ElementTree.parse(report) for report in reports]
    cases = [case for root in roots for case in root.iter("testcase")]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    suites = [suite for root in roots for suite in root.iter("testsuite")]
    return {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": len(bad),
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in bad),
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites)),
    }


def machine() -> str:
    """The processor, and the cores that this process may use."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = found[1] if found else platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def test(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the cell passed, now or before with the same wheel and tests."""
    python, wheel = interpreter(cell.python), wheel_for(cell.python, options.wheels)
    if python is None or wheel is None:
        need = (
            f"a wheel for Python {cell.python} in {options.wheels}"
            if python
            else f"python{cell.python}"
        )
        say(f"{cell.name}: not run, it needs {need}")
        return False
    selection = {
        "wheel": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "selection": " ".join(options.tests) or "all",
    }
    path = RESULTS / f"{cell.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("failed") == 0 and selection.items() <= before.items():
        say(f"{cell.name}: passed on {before['date']}")
        return True
    # One folder of reports for each wheel and selection.
    key = hashlib.sha256(json.dumps(selection).encode()).hexdigest()[:12]
    reports = RESULTS / f"{cell.name}-{key}"
    folder = Path(options.folder or tempfile.mkdtemp(prefix="torchcall-matrix-")) / cell.name
    if folder.resolve().is_relative_to(ROOT):
        sys.exit(f"torchcall: expected a folder outside {ROOT}, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{cell.name}: installing {wheel.name} and its dependencies into {folder}")
    try:
        result = run_tests(install(cell, python, wheel, folder), folder, reports, options)
    except Failed as error:
        say(f"{cell.name}: {error}")
        return False
    finally:
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(folder)
    when = {"date": datetime.date.today().isoformat(), "machine": machine(), "jobs": options.jobs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cell": cell.name, **selection, **result, **when}, indent=1) + "\n")
    shutil.rmtree(reports)  # a cell that failed starts again
    say(f"{cell.name}: {result['passed']} passed, {result['failed']} failed, {path}")
    return not result["failed"]


def table() -> str:
    """The committed results, as Markdown."""
    lines = [
        "| Python | torch | jax, jaxlib | tests | passed | skipped | failed | time | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(COMMITTED.glob("*.json")):
        r = json.loads(path.read_text())
        files = len(r["selection"].split())
        tests = "all" if r["selection"] == "all" else f"{files} files or folders"
        lines.append(
            "| {python} | {torch} | {jax} | {tests} | {passed} | {skipped} | {failed} |"
            " {seconds} s | {date} |".format(**r["versions"], **r, tests=tests)
        )
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page with its table generated again."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", type=Cell, help="default: every cell")
    parser.add_argument("--tests", nargs="+", default=[], help="files of tests; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="for the environments; default: a temporary one")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.table:
        PAGE.write_text(filled(PAGE.read_text()))
        return
    passed = [test(cell, options) for cell in options.cells or map(Cell, CELLS)]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
