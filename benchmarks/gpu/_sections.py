"""The sections of `check.py`: what each runs, how long it may, and running them.

Imports nothing that is not Python's own: torchcall is not built yet when this starts.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from _built import command

ROOT = Path(__file__).resolve().parents[2]
BUILT, OBJECTS = ROOT / "build" / "gpu", ROOT / "build" / "gpu-objects"
HERE = Path(__file__).resolve().parent
# Warnings of some compilers inside torch's headers. The check must not depend on the compiler's
# version.
MIDDLE_END = ("stringop-overflow", "array-bounds", "maybe-uninitialized", "restrict", "nonnull")


@dataclass
class Outcome:
    """How a section ended: "passed", "failed", "skipped" or "not run", with a note."""

    status: str
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        command: A command line, or the reason why the section is skipped.
        limit: Its time limit in seconds.
        env: Changes of the environment; None removes a variable.
        refused: A pattern. A matching line of output means that the machine does not support this.
        needed: Whether the other sections are not run if this one fails.
        beside: Whether it runs in parallel with the previous section, unless that one is needed.
    """

    command: list[str] | str
    limit: float
    env: dict[str, str | None] = field(default_factory=dict)
    refused: str = ""
    needed: bool = False
    beside: bool = False


DEVICE = """
import json, sys
device, path = sys.argv[1:]
import jax, jaxlib, numpy, torch
versions = dict(python=sys.version.split()[0], jax=jax.__version__, jaxlib=jaxlib.__version__,
                torch=torch.__version__, cuda=str(torch.version.cuda), numpy=numpy.__version__)
print("  ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
machine = {"device": device}
if device == "cuda":
    if not torch.cuda.is_available():
        sys.exit(f"gpu-check: no CUDA device: torch {torch.__version__} sees none")
    try:
        found = jax.devices("cuda")
    except RuntimeError as error:
        sys.exit(f"gpu-check: no CUDA device: JAX {jax.__version__}: {str(error).splitlines()[0]}")
    free, total = torch.cuda.mem_get_info(0)
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    machine |= {"gpu": torch.cuda.get_device_name(0), "gpu_gib": round(total / 2**30, 1),
                "capability": capability, "jax_devices": list(map(str, found))}
print("  ".join(f"{k} {v}" for k, v in machine.items()))
json.dump({"machine": machine, "versions": versions}, open(path, "w"), indent=2)
"""


def sections(options: argparse.Namespace) -> dict[str, Section]:
    """Every section for these options."""
    gpu = options.device == "cuda"
    device = ["--device", options.device]
    quick = [] if gpu else ["--quick"]
    options.out.mkdir(parents=True, exist_ok=True)

    def to(name: str) -> list[str]:
        return ["--json", str(options.out / f"gpu_{name}.json")]

    def script(name: str, *arguments: object) -> list[str]:
        return command(HERE / name, *device, *quick, *arguments)

    half = os.environ.get("TORCHCALL_TORCH_HALF")
    sanitizer = shutil.which("compute-sanitizer") or _in_cuda("compute-sanitizer")
    short = command(HERE / "short_run.py", *device)
    report = f"--junitxml={options.out / 'gpu_tests.xml'}"
    tests = 170 if gpu else 1200
    # Alone it has all the time there is.
    bench = 120.0 if not options.sections else options.limit - 15
    no_half = (
        "TORCHCALL_TORCH_HALF is not set: no library built elsewhere to try" if not half else ""
    )
    no_sanitizer = "no compute-sanitizer here" if sanitizer is None else ""
    return {
        "device": Section(
            [sys.executable, "-c", DEVICE, options.device, str(options.out / "gpu_device.json")],
            60, needed=True,
        ),
        "build": Section(build_command(), 300, env=_flags(), needed=True),
        "tests": Section(pytest(report, str(ROOT / "tests" / "gpu")), tests, env=_tests(gpu)),
        "packages": Section(
            script("md.py", "--packages-only", "--engines", "AOTInductor")
            if gpu else "a dry run compiles no packages",
            170, beside=True,
        ),
        "transfers": Section(script("transfers.py", *to("transfers")), 75, env=_half_card()),
        "bench": Section(
            script("md.py", *to("md"), "--check", "--budget", bench - 15,
                   "--rounds", 5, "--seconds", 0.03), bench,
            env=_half_card(),
        ),
        "memory": Section(script("memory.py", *to("memory"), "--budget", 60), 70),
        "half": Section(
            no_half or short, 60, env={"TORCHCALL_TORCH_HALF": half, **_half_card()}
        ),
        "sanitizer": Section(
            no_sanitizer or [str(sanitizer), "--error-exitcode", "99", *short], 90,
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            refused=r"[Dd]evice not supported|not supported on|[Uu]nable to|LibraryNotLoaded",
        ),
    }  # fmt: skip


def build_command() -> list[str]:
    """The build, offline, into a folder of its own."""
    return [
        sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps",
        "--disable-pip-version-check", "--upgrade", "--target", str(BUILT), str(ROOT),
        "-C", f"build-dir={OBJECTS}",
    ]  # fmt: skip


def pytest(*arguments: str) -> list[str]:
    """pytest over the tests marked `gpu`, side by side where xdist is installed.

    They are all in tests/gpu: other files import what is not installed there.
    """
    # Deprecations are for those who develop; here they depend on what happens to be installed.
    quiet = [f"-Wdefault::{kind}Warning" for kind in ("Deprecation", "Future", "Resource")]
    run = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--durations=5",
        *quiet,
    ]
    if find_spec("xdist"):
        run += ["-n", "6", "--dist", "loadfile"]
    if find_spec("pytest_timeout"):
        run += ["--timeout", "150"]
    return command(*run, *arguments)


def run_sections(
    wanted: dict[str, Section], limit: float, done: Callable[[dict[str, Outcome]], None]
) -> dict[str, Outcome]:
    """Runs sections in order.

    Args:
        wanted: By name.
        limit: Seconds for all.
        done: Called with the outcomes so far, after each section.
    """
    end = time.monotonic() + limit
    outcomes: dict[str, Outcome] = {}
    names = list(wanted)
    while names:
        group = [names.pop(0)]
        while names and wanted[names[0]].beside and not wanted[group[0]].needed:
            group.append(names.pop(0))
        threads = [
            threading.Thread(target=_run_into, args=(outcomes, name, wanted[name], end))
            for name in group
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done(outcomes)
        if any(wanted[n].needed and outcomes[n].status == "failed" for n in group):
            for name in names:
                outcomes[name] = Outcome("not run", note=f"{group[0]} failed")
            done(outcomes)
            break
    return {name: outcomes[name] for name in wanted}


def _run_into(outcomes: dict[str, Outcome], name: str, section: Section, end: float) -> None:
    begun = time.monotonic()
    left = end - begun
    if isinstance(section.command, str):
        outcome = Outcome("skipped", note=section.command)
    elif left < 15:
        outcome = Outcome("failed", note="no time left")
    else:
        outcome = _run(name, section, min(section.limit, left))
    outcome.seconds = round(time.monotonic() - begun, 1)
    outcomes[name] = outcome
    print(f"[{name}] {outcome.status} {outcome.note}".rstrip(), flush=True)


def _run(name: str, section: Section, limit: float) -> Outcome:
    print(f"\n[{name}] at most {limit:.0f} s", flush=True)
    env = dict(os.environ)
    env.pop("TORCHCALL_TORCH_HALF", None)  # only one section uses another torch half
    env |= {
        "PYTHONUNBUFFERED": "1",
        "TORCHCALL_CACHE": str(ROOT / "build" / "gpu-cache"),
        # The profiler's library reports each start and stop on its standard error.
        "KINETO_LOG_LEVEL": "5",
    }
    if (BUILT / "torchcall").is_dir():
        env["TORCHCALL_BUILT"] = str(BUILT)
    env |= {key: value for key, value in section.env.items() if value is not None}
    process = subprocess.Popen(
        section.command, env=env, text=True, errors="replace", bufsize=1, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, name, lines), daemon=True)
    reader.start()
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)
        return Outcome("failed", note=f"not done within {limit:.0f} s")
    reader.join(timeout=5)
    last = next((line for line in reversed(lines) if line.strip()), "").strip()
    if section.refused and status and any(re.search(section.refused, line) for line in lines):
        refusal = next(line for line in lines if re.search(section.refused, line))
        return Outcome("skipped", note=f"refused here: {refusal.strip()[:150]}")
    if status:
        return Outcome("failed", note=f"exit status {status}: {last[:200]}")
    return Outcome("passed", note=last[:200])


def _read(process: "subprocess.Popen[str]", name: str, lines: list[str]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            lines.append(line)
            print(f"{name}| {line}", end="", flush=True)


def _flags() -> dict[str, str | None]:
    flags = [os.environ.get("CXXFLAGS", ""), *(f"-Wno-error={name}" for name in MIDDLE_END)]
    return {"CXXFLAGS": " ".join(flags).strip()}


def _half_card() -> dict[str, str | None]:
    """XLA takes half of the card's memory; torch has the rest."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".50"}


def _tests(gpu: bool) -> dict[str, str | None]:
    # Several processes share the card.
    shared: dict[str, str | None] = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return shared | ({"TORCHCALL_REQUIRE_GPU": "1"} if gpu else {"TORCHCALL_GPU_TESTS_ON_CPU": "1"})


def _in_cuda(program: str) -> str | None:
    """A program of the CUDA toolkit that is not on the path."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    for place in places:
        if (path := place / "bin" / program).is_file():
            return str(path)
    return None
