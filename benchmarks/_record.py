"""The results file of a benchmark: its rows, and where, when and with which versions it ran."""

import json
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchcall.demo._timing import machine, versions

ROOT = Path(__file__).parents[1]
LOAD = os.getloadavg()[0]
# Packages whose version counts only in the benchmarks that import them: module and package.
OPTIONAL = {
    "ase": "ase",
    "chgnet": "chgnet",
    "e3nn": "e3nn",
    "jax_md": "jax-md",
    "mace": "mace-torch",
    "matscipy": "matscipy",
    "nequip": "nequip",
    "sevenn": "sevenn",
    "torch_sim": "torch-sim-atomistic",
    "vesin": "vesin",
}


def record(
    path: Path, rows: list[dict[str, object]], *, part_of: str | None = None, **more: Any
) -> None:
    """Writes a results file.

    Args:
        path: The file; its folder is made.
        rows: One for each method of each case.
        part_of: The command of which this run is a part. It adds to the file, in place of its rows
            of the same case and method.
        more: Other entries; dictionaries are merged, too.
    """
    used = {package: version(package) for name, package in OPTIONAL.items() if name in sys.modules}
    document = {"measured": measured(), "machine": machine(), "versions": versions() | used}
    if part_of is not None:
        document["measured"]["command"] = part_of
    if part_of is not None and path.is_file():
        old = json.loads(path.read_text())
        document["versions"] = old["versions"] | document["versions"]
        new = {(row["case"], row["method"]) for row in rows}
        rows = [row for row in old["rows"] if (row["case"], row["method"]) not in new] + rows
        for name, value in old.items():
            if name not in ("measured", "machine", "versions", "rows"):
                more[name] = value | more.get(name, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document | more | {"rows": rows}, indent=2) + "\n")


def measured() -> dict[str, object]:
    """The date, the last commit that changed the code, the command, and what influences times."""
    words = sys.argv[1:]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *words]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "load_average": round(LOAD, 1),  # before the benchmark
    }


def commit() -> str:
    """The last commit that changed `csrc` or `python`; `+` if files there have changed since."""
    code = ["--", "csrc", "python"]
    found = _git("log", "-1", "--format=%h", *code)
    return found + ("+" if found and _git("status", "--porcelain", *code) else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()
