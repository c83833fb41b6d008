"""`torchcall doctor`: what it reports, and that each problem comes with its remedy."""

import json
import sys
from types import SimpleNamespace

import jax
import jaxlib
import pytest
import torch
from models import run_python

import torchcall
from torchcall import _bridge, _native
from torchcall.__main__ import main
from torchcall._doctor import caches, cpu, gpus, self_tests, torch_half, versions
from torchcall._doctor.report import Section, as_json, examined

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "cache"))


def found(probe, **options):
    """The section of one probe; fails if the probe raises."""
    section = Section("part")
    probe(section, **options)
    return section


def remedies(section):
    return {problem.what: problem.remedy for problem in section.problems}


def test_the_report_has_versions_devices_and_passed_tests(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # whatever earlier tests set
    report = torchcall.doctor()
    printed = capsys.readouterr().out
    for name, module in {"jax": jax, "jaxlib": jaxlib, "torch": torch}.items():
        assert report["versions"][name] == module.__version__
        assert module.__version__ in printed
    half = str(_native.find_torch_half(torch.__version__, _native.library_root()))
    assert report["torch_half"]["path"] == half
    assert half in [entry["path"] for entry in report["torch_half"]["found"]]
    for name in ("torchscript", "eager", "neighbor_list", "export"):
        assert report["self_tests"][name]["status"] == "ok", name
    assert report["self_tests"]["package"]["status"] == "untested"
    assert report["gpus"]["agree"] is True
    assert report["problems"] == []
    assert report["ok"] is True
    assert "problems: none" in printed


def test_a_failing_engine_is_a_problem_and_status_1(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("the bridge is broken\nsecond line")

    monkeypatch.setattr(_bridge.Model, "from_live", broken)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["self_tests"]["torchscript"]["status"] == "failed"
    assert report["self_tests"]["eager"]["status"] == "ok"
    problem = report["problems"][0]
    assert "the bridge is broken" in problem["what"]
    assert problem["section"] == "self_tests"
    assert problem["remedy"].startswith("pip install ")


def test_without_torch_it_reports_the_rest(tmp_path):
    code = """
        import sys
        sys.modules["torch"] = None
        import torchcall
        report = torchcall.doctor()
        assert [p["section"] for p in report["problems"]] == ["versions"], report["problems"]
        assert "torch" in report["problems"][0]["remedy"]
        assert report["gpus"]["jax_devices"]
        assert report["torch_half"]["found"]
    """
    run_python(tmp_path, code)


@pytest.mark.parametrize("version, too", [("2.10.1", "old"), ("2.16.0", "new"), ("3.0", "new")])
def test_a_torch_that_is_too_old_or_new_is_a_problem(monkeypatch, version, too):
    del too
    monkeypatch.setattr(torch, "__version__", version)
    problems = remedies(found(versions.probe))
    (what,) = problems
    assert what.startswith("expected torch>=2.11,<2.16")
    assert what.endswith(version)
    assert problems[what] == "pip install --upgrade 'torch>=2.11,<2.16'"


def test_a_missing_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: None if name == "jax" else "9.9.9")
    monkeypatch.setattr(versions, "satisfies", lambda *_: True)
    assert remedies(found(versions.probe))["jax is not installed"].startswith("pip install 'jax>=")


@pytest.mark.parametrize(
    "version, wanted, fits",
    [
        ("2.11.0", ">=2.11,<2.16", True),
        ("2.16", ">=2.11,<2.16", False),
        ("2.9.1", ">=2.11", False),
        ("0.10.2", ">=0.8.1", True),
        ("2.13.0+cpu", "==2.13", True),
        ("1.2", "!=1.2.0", False),
        ("1.2", "", True),
    ],
)
def test_version_ranges(version, wanted, fits):
    packaging = pytest.importorskip("packaging.specifiers")
    assert packaging.SpecifierSet(wanted).contains(version) == fits
    assert versions.satisfies(version, wanted) == fits


@pytest.fixture
def not_loaded(monkeypatch):
    """Makes the probe load the torch half, as in a new process."""
    monkeypatch.delitem(sys.modules, "torchcall._loaded", raising=False)


@pytest.mark.usefixtures("not_loaded")
def test_a_broken_torch_half_is_a_problem(monkeypatch, tmp_path):
    half = tmp_path / "half.so"
    half.write_text("not a library")
    monkeypatch.setenv("TORCHCALL_TORCH_HALF", str(half))
    section = found(torch_half.probe)
    assert list(remedies(section).values()) == ["unset TORCHCALL_TORCH_HALF"]
    assert section.values["override"] == str(half)
    assert section.values["loaded"] is False
    skipped = found(self_tests.probe, compile=False)
    assert {test["status"] for test in skipped.values.values()} == {"untested"}


@pytest.mark.usefixtures("not_loaded")
def test_a_torch_without_a_half_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    section = found(torch_half.probe)
    newest = section.values["found"][-1]["torch"]
    assert list(remedies(section).values()) == [f"pip install 'torch=={newest}.*'"]


def fake_torch(cuda, names):
    return SimpleNamespace(
        __version__="2.13.0+cpu",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(names),
            device_count=lambda: len(names),
            get_device_name=lambda i: names[i],
            init=lambda: None,
        ),
    )


@pytest.mark.parametrize(
    "of_jax, cuda, of_torch, remedy",
    [
        (["H100"], None, [], "pip install --force-reinstall torch==2.13.0"),
        (["H100"], "13.0", [], "pip install --force-reinstall torch==2.13.0  # or update"),
        ([], "12.6", ["H100"], "pip install --upgrade 'jax[cuda12]'"),
        (["H100"], "13.0", ["H100", "A100"], "export CUDA_VISIBLE_DEVICES=0"),
        (["H100"], "13.0", ["H100"], None),
        ([], "13.0", [], None),
    ],
)
def test_gpus_of_jax_and_torch_that_differ_are_a_problem(
    monkeypatch, of_jax, cuda, of_torch, remedy
):
    devices = [SimpleNamespace(platform="gpu", device_kind=kind) for kind in of_jax]
    devices = devices or [SimpleNamespace(platform="cpu", device_kind="cpu")]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, of_torch))
    section = found(gpus.probe, own_process=True)
    got = list(remedies(section).values())
    assert len(got) == (remedy is not None)
    assert all(text.startswith(remedy) for text in got)
    assert section.values["agree"] is (remedy is None)


def test_jax_that_does_not_start_is_a_problem(monkeypatch):
    def fail():
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    section = found(gpus.probe, own_process=False)
    assert list(remedies(section).values()) == ["unset JAX_PLATFORMS"]


def test_more_threads_than_cores_are_a_problem(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu.cgroup_cores(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu.cgroup_cores(tmp_path) is None
    monkeypatch.setattr(cpu, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert list(remedies(found(cpu.probe)).values()) == ["export OMP_NUM_THREADS=2"]


def test_a_cache_that_cannot_be_used_is_a_problem(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TORCHCALL_CACHE", str(file))
    problems = remedies(found(caches.probe))
    assert len(problems) == 2  # packages and programs
    assert all(remedy.startswith("export TORCHCALL_CACHE=") for remedy in problems.values())


def test_the_size_of_a_cache_and_the_command_that_clears_it(monkeypatch, tmp_path):
    folder = tmp_path / "my packages"
    (folder / "programs").mkdir(parents=True)
    (folder / "a.pt2").write_bytes(bytes(1000))
    (folder / "programs" / "b").write_bytes(bytes(234))
    monkeypatch.setenv("TORCHCALL_CACHE", str(folder))
    values = found(caches.probe).values
    assert (values["packages"]["bytes"], values["programs"]["bytes"]) == (1234, 234)
    assert values["packages"]["clear"] == f"rm -r '{folder}'"


def test_a_missing_compiler_is_a_note(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    section = found(self_tests.probe, compile=False)
    assert section.problems == []
    assert [note.remedy for note in section.notes] == ["unset CXX"]


def test_a_damaged_package_is_a_problem():
    path = self_tests.package_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK damaged")
    section = found(self_tests.probe, compile=False)
    assert list(remedies(section).values()) == ["torchcall doctor --compile"]


def test_a_probe_that_raises_is_a_problem():
    def probe(section):
        section.values["before"] = 1
        raise OSError("unreadable")

    report = as_json([examined("part", probe)])
    assert report["part"] == {"before": 1}
    assert "unreadable" in report["problems"][0]["what"]
