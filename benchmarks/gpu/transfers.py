"""Counts copies to the host and synchronisations in a simulation's loop, with torch's profiler.

    python benchmarks/gpu/transfers.py --json benchmarks/results/gpu_transfers.json

The profiler uses CUPTI, so it records XLA's work as well as torch's. Only events between the first
and the last launch of one jitted loop count, and there must be none; the caller's wait at the end
does not count. A control program that copies and synchronises shows that the counter works.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
from _common import device_of, gpu_parser, potentials, where
from _models import EAGER, SCRIPT, Engines
from _peers import pure_call
from _steps import step_loop
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

# Names of the runtime's and of the driver's functions that keep the calling thread waiting.
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")
# Kinds of CUPTI's own record of synchronisations, which sees those of the driver's interface too.
WAIT_KINDS = ("Event Sync", "Stream Sync", "Context Sync")
HOST_COPIES = ("DtoH", "DtoP")  # device to pageable or pinned memory


def events_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The profiler's complete events while `run` runs."""
    sync = _ExperimentalConfig(enable_cuda_sync_events=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, experimental_config=sync) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def is_launch(event: dict[str, Any]) -> bool:
    """Whether a thread of the host starts work of the device here."""
    return event.get("cat") in ("cuda_runtime", "cuda_driver") and "Launch" in event["name"]


def copies_to_host(event: dict[str, Any]) -> bool:
    """Whether the device copies to the host here."""
    return event.get("cat") == "gpu_memcpy" and any(k in event["name"] for k in HOST_COPIES)


def waits(event: dict[str, Any]) -> bool:
    """Whether a thread of the host waits for the device here."""
    kind = event.get("args", {}).get("cuda_sync_kind", event["name"])
    if event.get("cat") == "cuda_sync":
        return any(name in kind for name in WAIT_KINDS)
    return event.get("cat") in ("cuda_runtime", "cuda_driver") and any(
        name in event["name"] for name in WAITS
    )


def count(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What happens between the first and the last launch.

    Returns:
        `launches`, `host_copies`, `waits`, and `seen`: the names of the copies and waits.
    """
    launches = [event["ts"] for event in events if is_launch(event)]
    if not launches:
        return {"launches": 0, "host_copies": 0, "waits": 0, "seen": {}}
    inside = [e for e in events if min(launches) < e["ts"] < max(launches)]
    copies, waiting = [e for e in inside if copies_to_host(e)], [e for e in inside if waits(e)]
    names = Counter(f"{e.get('cat')}: {e['name']}" for e in copies + waiting)
    return {
        "launches": len(launches),
        "host_copies": len(copies),
        # A wait appears as a call and again as CUPTI's own record.
        "waits": len([e for e in waiting if e.get("cat") != "cuda_sync"])
        or len([e for e in waiting if e.get("cat") == "cuda_sync"]),
        "seen": dict(names),
    }


def main(argv: list[str] | None = None) -> int:
    """Counts for each method; the status is 1 if there is anything, or if the counter is blind."""
    result = gpu_parser(__doc__ or "")
    result.add_argument("--atoms", type=int, default=256)
    options = result.parse_args(argv)
    device = device_of(options.device)
    length = 10 if options.quick else 100
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    module, cutoff = potentials(16)["Lennard-Jones"]
    engines = Engines("Lennard-Jones", module, cutoff, device, None)
    models = {
        f"torchcall, captured, {SCRIPT}": engines.model(SCRIPT, cuda_graph="auto"),
        f"torchcall, uncaptured, {SCRIPT}": engines.model(SCRIPT, cuda_graph="off"),
        f"torchcall, captured, {EAGER}": engines.model(EAGER, cuda_graph="auto"),
        "control, pure_callback": pure_call(engines.forwards[SCRIPT], device),
    }
    print(f"{options.atoms} Lennard-Jones atoms, {length} steps in one jitted loop")
    print(f"  {'method':<36}{'launches':>10}{'copies to host':>16}{'waits':>8}")
    for name, model in models.items():
        loop, args = step_loop(model, engines, options.atoms, length)
        run = loop.lower(*args).compile()
        for _ in range(3):
            jax.block_until_ready(run(*args))
        counted = count(events_of(lambda run=run, args=args: jax.block_until_ready(run(*args))))
        rows.append({"case": "transfers", "method": name, "steps": length} | counted)
        print(
            f"  {name:<36}{counted['launches']:>10}{counted['host_copies']:>16}"
            f"{counted['waits']:>8}", flush=True
        )  # fmt: skip
        for what, how_often in counted["seen"].items():
            print(f"    {how_often:>6} × {what}")
        if not device.is_gpu:
            continue
        nothing = counted["host_copies"] == 0 and counted["waits"] == 0
        if name.startswith("control") and nothing:
            failures.append(f"{name}: expected copies and waits, got none: the counter fails")
        if not name.startswith("control") and not (nothing and counted["launches"] > length):
            failures.append(f"{name}: expected no copy and no wait in {length} steps")
    if options.json is not None:
        machine, versions = where()
        document = {"machine": machine, "versions": versions, "rows": rows, "failures": failures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    for failure in failures:
        print(f"FAIL  {failure}")
    if not device.is_gpu:
        print("no CUDA device: a dry run, nothing was counted")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
