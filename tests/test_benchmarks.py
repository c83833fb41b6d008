"""Each benchmark runs and writes its results in the common format."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TORCH_LOOPS = {"torch, C++ loop", "torch, Python loop"}
JAX_METHODS = {"torchcall", "buffer_callback", "pure_callback"}


def run(script, *options):
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *options],
        capture_output=True,
        text=True,
        timeout=900,
        # Two torch threads on two busy cores wait for each other.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def checked_document(path):
    document = json.loads(path.read_text())
    assert set(document) - {"found"} == {"measured", "machine", "versions", "rows"}
    assert {"date", "commit", "command", "OMP_NUM_THREADS"} <= set(document["measured"])
    assert {"cpu", "cores", "os"} <= set(document["machine"])
    assert {"python", "jax", "jaxlib", "torch", "torchcall"} <= set(document["versions"])
    for row in document["rows"]:
        keys = {"case", "method", "engine", "us_median", "us_iqr", "n"}
        assert set(row) - {"us_least"} == keys
        assert row["us_median"] > 0
        assert row["us_iqr"] >= 0
        assert row["n"] >= 1
    return document


@pytest.mark.slow  # half a minute
def test_call_overhead_times_every_case_and_prints_every_verdict(tmp_path):
    path = tmp_path / "results" / "call_overhead.json"
    options = ("--quick", "--without", "wrap_torch2jax", "--json", path)
    done = run("call_overhead.py", *options)
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert [case[:3] for case in cases] == ["(a)", "(b)", "(c)", "(c)", "(d)", "(d)"]
    for case in cases:
        methods = {row["method"] for row in rows if row["case"] == case}
        assert methods - {"memcpy of the output"} == TORCH_LOOPS | JAX_METHODS
        assert any(f"  {case}: " in line for line in done.stdout.splitlines())
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(verdicts) == 10


@pytest.mark.slow
def test_md_loop_runs_every_method(tmp_path):
    path = tmp_path / "md_loop.json"
    done = run("md_loop.py", "--quick", "--without", "wrap_torch2jax", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    assert {row["case"] for row in rows} == {"md, 64 atoms"}
    forward_only = {f"{name}, forward only" for name in TORCH_LOOPS}
    assert {row["method"] for row in rows} == forward_only | JAX_METHODS


@pytest.mark.slow
def test_shares_of_a_step_add_up_to_it(tmp_path):
    path = tmp_path / "step_shares.json"
    done = run("step_shares.py", "--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    parts, found = (
        {row["method"]: row["us_median"] for row in rows if row["case"].startswith(case)}
        for case in ("Lennard-Jones, 64 atoms, ", "share of a step: Lennard-Jones, 64 atoms")
    )
    assert len(parts) + len(found) == len(rows)
    # Of two samples, the median is the mean, and the least is not above it.
    (step,) = [us for method, us in parts.items() if method.endswith(": a step")]
    assert 0 < found["sum, a step"] <= step
    table = done.stdout.partition("share of a step")[2].splitlines()[1:]
    shares = [float(line.split()[-2]) for line in table[:9]]
    assert shares[-1] == pytest.approx(sum(shares[:-1]), abs=0.1)
    assert shares[-1] == pytest.approx(found["sum, a step"], abs=0.1)


@pytest.mark.slow
def test_threads_times_one_call_and_two_at_once(tmp_path):
    path = tmp_path / "threads.json"
    done = run("threads.py", "--quick", "--only", "TorchScript", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    case = "TorchScript, 64 atoms"
    assert {row["case"] for row in rows} == {case, f"{case}, on two devices at once"}
    # One thread is the whole budget here.
    assert {row["method"] for row in rows} == {"threads=1", 'threads="auto"'}
    assert "auto chose 1 from {1: " in done.stdout


@pytest.mark.slow  # five processes
def test_scaling_times_devices_and_processes(tmp_path):
    path = tmp_path / "scaling.json"
    done = run("scaling.py", "--quick", "--only", "TorchScript", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    assert {row["method"] for row in rows} == {
        "one device",
        "two devices",
        "two processes",
        "one device in each of two unconnected processes",
    }
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(verdicts) == 5


@pytest.mark.slow  # jax-md compiles about a hundred small programs
@pytest.mark.parametrize("without", ["jax-md", ""])
def test_neighbor_list_times_every_method(without, tmp_path):
    path = tmp_path / "neighbor_list.json"
    options = ("--atoms", "200", "--rounds", "2", "--seconds", "0.01", "--json", path)
    done = run("neighbor_list.py", *options, *(["--without", without] if without else []))
    assert done.returncode == 0, done.stderr
    rows = checked_document(path)["rows"]
    assert {row["case"] for row in rows} == {"200 atoms"}
    assert len({row["method"] for row in rows}) == (6 if without else 10)


# Each row takes a fresh process.
@pytest.mark.slow
@pytest.mark.parametrize("rows", [pytest.param("import torchcall", id="imports"), ""])
def test_latency_measures_fresh_processes(rows, tmp_path):
    path = tmp_path / "latency.json"
    done = run("latency.py", "--quick", "--only", rows, "--json", path)
    assert done.returncode == 0, done.stderr
    cases = {row["case"] for row in checked_document(path)["rows"]}
    assert "import torchcall, after jax and torch" in cases
    assert len(cases) == (2 if rows else 13)
    goals = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(goals) == (1 if rows else 10)


def test_tables_figures_and_claims_of_the_documents_are_those_of_the_results():
    done = run("make_tables.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_figure_is_drawn_from_results(tmp_path):
    rows = [
        {"case": case, "method": method, "engine": "-", "us_median": 3.0, "us_iqr": 0.5, "n": 9}
        for case in ("(a)", "(b)", *(f"(d) Lennard-Jones forces, {n} atoms" for n in (64, 1728)))
        for method in ("torchcall", "pure_callback")
    ]  # fmt: skip
    machine = {"cpu": "a processor", "cores": 2, "os": "an os"}
    document = {"machine": machine, "versions": {"jax": "1", "torch": "2"}, "rows": rows}
    (tmp_path / "call_overhead.json").write_text(json.dumps(document))
    options = ("--only", "call_overhead", "--results", tmp_path, "--figures", tmp_path / "images")
    done = run("plot_results.py", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "images/call_overhead.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_a_figure_without_results_is_an_error(tmp_path):
    done = run("plot_results.py", "--results", tmp_path, "--figures", tmp_path / "images")
    assert done.returncode == 2
    assert done.stderr.startswith("torchcall: ")
    assert "expected a benchmark's results" in done.stderr
