"""`make gpu-check` without a GPU: its report, its sections and its transfer counter."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def load(monkeypatch):
    """Imports a module from benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def python(*code):
    return [sys.executable, "-c", *code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_reports_it_and_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "check.py", "--out", tmp_path],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"gpu-check: no CUDA device: torch {torch.__version__} sees none" in done.stdout
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {"machine", "versions", "sections"} <= set(document)
    outcomes = {entry["section"]: entry["status"] for entry in document["sections"]}
    assert outcomes.pop("device") == "failed"
    assert set(outcomes.values()) == {"not run"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_prints_one_line():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "md.py"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == f"torchcall: no CUDA device: torch {torch.__version__} sees none"


def test_sections_pass_fail_time_out_and_are_skipped_independently(load):
    part = load("_sections")
    wanted = {
        "good": part.Section(python("print('fine')"), 30),
        "bad": part.Section(python("import sys; print('why'); sys.exit(3)"), 30),
        "slow": part.Section(python("import time; time.sleep(60)"), 1),
        "missing": part.Section("no such tool", 30),
        "refused": part.Section(
            python("import sys; print('Device not supported'); sys.exit(9)"), 30,
            refused="not supported",
        ),
        "beside": part.Section(python("print('last')"), 30, beside=True),
    }  # fmt: skip
    seen = []
    outcomes = part.run_sections(wanted, 100.0, lambda done: seen.append(set(done)))
    found = {name: (outcome.status, outcome.note) for name, outcome in outcomes.items()}
    assert found == {
        "good": ("passed", "fine"),
        "bad": ("failed", "exit status 3: why"),
        "slow": ("failed", "not done within 1 s"),
        "missing": ("skipped", "no such tool"),
        "refused": ("skipped", "refused here: Device not supported"),
        "beside": ("passed", "last"),
    }
    assert seen[0] == {"good"}
    assert seen[-1] == set(wanted)


def test_nothing_runs_after_a_needed_section_fails(load):
    part = load("_sections")
    wanted = {
        "build": part.Section(python("import sys; sys.exit('no compiler')"), 30, needed=True),
        "tests": part.Section(python("print('never')"), 30),
    }
    outcomes = part.run_sections(wanted, 100.0, lambda _: None)
    assert outcomes["build"].note == "exit status 1: no compiler"
    assert outcomes["tests"].status == "not run"


def test_transfer_counter_counts_events_between_launches(load):
    count = load("transfers").count

    def event(cat, name, ts, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "args": args}

    loop = [
        event("cuda_runtime", "cudaStreamSynchronize", 1),
        event("cuda_driver", "cuLaunchKernel", 2),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 3),
        event("cuda_sync", "Stream Wait Event", 4, cuda_sync_kind="Stream Wait Event"),
        event("cuda_runtime", "cudaGraphLaunch", 9),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 10),
        event("cuda_driver", "cuStreamSynchronize", 11),
    ]
    assert count(loop) == {"launches": 2, "host_copies": 0, "waits": 0, "seen": {}}
    bad = [
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 5),
        event("cuda_sync", "Stream Sync", 6, cuda_sync_kind="Stream Sync"),
        event("cuda_runtime", "cudaEventSynchronize", 7),
    ]
    counted = count(loop + bad)
    assert (counted["host_copies"], counted["waits"]) == (1, 1)
    assert len(counted["seen"]) == 3
    only_record = count(loop + bad[1:2])
    assert only_record["waits"] == 1


def test_box_has_the_requested_atoms_and_density(load):
    box = load("_common").box
    for n_atoms in (64, 256, 1024, 16384):
        positions, cell = box(n_atoms)
        assert positions.shape == (n_atoms, 3)
        volume = cell[0, 0] * cell[1, 1] * cell[2, 2]
        assert n_atoms / volume == pytest.approx(3.64**-3)
    with pytest.raises(ValueError, match="power of two, got 100"):
        box(100)


@pytest.mark.slow
def test_gpu_benchmark_runs_on_the_cpu(tmp_path):
    path = tmp_path / "gpu_md.json"
    options = ["--device", "cpu", "--quick", "--potentials", "Lennard-Jones"]
    options += ["--engines", "TorchScript", "--only", "calls", "--json", path]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "md.py", *options],
        capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["left_out"] == []
    for row in document["rows"]:
        assert set(row) == {"case", "method", "engine", "us_median", "us_least", "us_iqr", "n"}
        assert row["us_median"] > 0
    calls = {row["method"] for row in document["rows"]}
    methods = {"torch, Python loop", "torchcall, uncaptured", "buffer_callback", "pure_callback"}
    assert calls == {f"{method}, TorchScript" for method in methods} | {"XLA's loop, no call"}


def test_figure_is_drawn_from_gpu_results_only(load, tmp_path):
    plot = load("plot")
    rows = [
        {"case": f"{kind}, message passing, {n} atoms, 9 edges", "method": method,
         "engine": "-", "us_median": 3.0 * n, "us_iqr": 0.5, "n": 9}
        for kind in ("calls", "steps")
        for n in (64, 256)
        for method in ("torchcall, captured, TorchScript", "pure_callback, TorchScript")
    ]  # fmt: skip
    document = {"machine": {}, "versions": {"jax": "1", "torch": "2"}, "rows": rows}
    results, figure = tmp_path / "gpu_md.json", tmp_path / "images" / "figure.png"
    options = ["--results", str(results), "--figure", str(figure)]
    results.write_text(json.dumps(document))
    assert plot.main(options) == 2  # results of a run on the CPU
    results.write_text(json.dumps(document | {"machine": {"gpu": "a card"}}))
    assert plot.main(options) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
