"""Runs everything that needs a GPU, on a machine with a GPU and no network.

    make gpu-check                                # python3 benchmarks/gpu/check.py
    make gpu-check SECTIONS="build tests"         # some sections only
    python3 benchmarks/gpu/check.py --device cpu  # a dry run without a GPU

Needs jax with its CUDA plugin, a CUDA torch, numpy, jaxtyping, pytest, nanobind, scikit-build-core,
CMake, ninja and a C++20 compiler. Nothing is downloaded, and only build/gpu is written to. Every
section has a time limit, prints while it runs and writes its own file. A failed section does not
stop the others. The exit status is 0 if none failed.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from _sections import ROOT, Outcome, Section, run_sections, sections

ORDER = (
    "device", "build", "tests", "packages", "transfers", "bench", "memory", "half", "sanitizer",
)  # fmt: skip


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as text."""
    lines = [f"\n{'section':<12}{'outcome':<10}{'s':>6}  note"]
    for name, outcome in outcomes.items():
        lines.append(f"{name:<12}{outcome.status:<10}{outcome.seconds:>6.0f}  {outcome.note}")
    return "\n".join(lines)


def write(path: Path, outcomes: dict[str, Outcome], options: argparse.Namespace) -> None:
    """Writes the outcomes as JSON, with the versions that the section `device` found."""
    found: dict[str, Any] = {}
    if (path.parent / "gpu_device.json").is_file():
        found = json.loads((path.parent / "gpu_device.json").read_text())
    document = {
        "machine": found.get("machine", {"os": platform.platform()}),
        "versions": found.get("versions", {"python": platform.python_version()}),
        "device": options.device,
        "sections": [{"section": name} | vars(outcome) for name, outcome in outcomes.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the selected sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of: {' '.join(ORDER)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
        help="where the JSON files go (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=470.0, metavar="S", help="for all sections (default: 470)"
    )
    parser.add_argument(
        "--installed", action="store_true", help="check the installed torchcall; no build"
    )
    options = parser.parse_args(argv)
    unknown = set(options.sections) - set(ORDER)
    if unknown:
        parser.error(f"unknown section {sorted(unknown)[0]!r}; there are {' '.join(ORDER)}")
    wanted = [name for name in ORDER if name in (options.sections or ORDER)]
    if options.installed:
        wanted = [name for name in wanted if name != "build"]
    options.out = options.out.resolve()
    os.chdir(ROOT)

    def done(outcomes: dict[str, Outcome]) -> None:
        write(options.out / "gpu_check.json", outcomes, options)

    every: dict[str, Section] = sections(options)
    begun = time.monotonic()
    outcomes = run_sections({name: every[name] for name in wanted}, options.limit, done)
    print(table(outcomes))
    failed = [name for name, outcome in outcomes.items() if outcome.status == "failed"]
    seconds = time.monotonic() - begun
    if failed:
        print(f"\ngpu-check: failed: {', '.join(failed)} ({seconds:.0f} s; {options.out})")
        return 1
    print(f"\ngpu-check: nothing failed ({seconds:.0f} s; {options.out})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
