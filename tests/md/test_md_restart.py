"""`torchcall md`: a run that was interrupted anywhere equals an unbroken one, byte for byte."""

import os
import signal
import subprocess
import sys
import time

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

from torchcall.__main__ import main
from torchcall._command.files import write_whole
from torchcall._command.included import argon_module, load_example
from torchcall.md import files
from torchcall.md.report import read_log
from torchcall.md.run import Run

ENSEMBLES = {
    "nve": ("--ensemble", "nve"),
    "nose-hoover": ("--ensemble", "nvt"),
    "langevin": ("--ensemble", "nvt", "--thermostat", "langevin"),
    "npt": ("--ensemble", "npt", "--pressure", "0.01"),
    "replicas": ("--ensemble", "nvt", "--thermostat", "langevin", "--replicas", "3"),
}
FILES = ("md.csv", "t.extxyz", "t-0.extxyz", "t-1.extxyz", "t-2.extxyz")


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    """32 argon atoms near fcc sites."""
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True).repeat(2)
    atoms.rattle(0.05, rng=np.random.default_rng(1))
    path = tmp_path_factory.mktemp("structures") / "crystal.xyz"
    ase.io.write(path, atoms)
    return path


@pytest.fixture
def md(crystal, tmp_path, monkeypatch):
    """Runs `torchcall md` on the crystal; `md(folder, *options)` returns its exit status."""

    def call(folder, *options):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return main(["md", *arguments(crystal), *options])

    return call


def arguments(crystal, steps=60):
    return (
        f"--structure {crystal} --cutoff 5 --temperature 30 --threads 1 --every 5 --skin 0.6 "
        f"--steps {steps} --traj t.extxyz --checkpoint-every 0"
    ).split()


@pytest.fixture(scope="module")
def unbroken(crystal, tmp_path_factory):
    """The files of a run of 60 steps that was not interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["md", *arguments(crystal)]) == 0
    return contents(folder)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def kill_after(monkeypatch, appends):
    """The process ends in the middle of the `appends`-th write, after half of it."""
    count = iter(range(10**9))
    pwrite = os.pwrite

    def half(file, data, at):
        if next(count) == appends:
            pwrite(file, data[: len(data) // 2], at)
            raise Killed
        return pwrite(file, data, at)

    monkeypatch.setattr(files.os, "pwrite", half)
    monkeypatch.setattr(files.os, "ftruncate", lambda *_: None)

    def end(run, work):
        try:
            work()
        except Killed:  # what the system does
            for file in run.files.values():
                file.close()
            raise

    monkeypatch.setattr(Run, "_stop_early", end)


@pytest.mark.parametrize(
    "ensemble",
    [
        pytest.param(name, marks=[] if name == "langevin" else pytest.mark.slow)
        for name in ENSEMBLES
    ],
)
def test_a_killed_run_continues_bit_for_bit(ensemble, md, tmp_path, monkeypatch):
    options = ENSEMBLES[ensemble]
    assert md("unbroken", *options) == 0
    appends = np.random.default_rng(len(ensemble)).integers(4, 14)
    with monkeypatch.context() as patch:
        kill_after(patch, appends)
        with pytest.raises(Killed):
            md("broken", *options)
    whole = contents(tmp_path / "unbroken")
    assert contents(tmp_path / "broken") != whole
    assert md("broken", "--restart") == 0
    assert contents(tmp_path / "broken") == whole
    assert len(whole) == (4 if ensemble == "replicas" else 2)


def test_a_longer_run_is_the_continued_shorter_one(md, tmp_path, unbroken):
    assert md("short", "--steps", "20") == 0
    assert contents(tmp_path / "short") != unbroken
    assert md("short", "--restart", "--steps", "60") == 0
    assert contents(tmp_path / "short") == unbroken


def stop_at(monkeypatch, step, action):
    """Calls `action` after the record of a step."""
    original = Run._write_record

    def write(self, now, *others):
        original(self, now, *others)
        if now == step:
            action()

    monkeypatch.setattr(Run, "_write_record", write)


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "action, status, name",
    [
        (raise_interrupt, 130, "Ctrl-C"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "SIGTERM"),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_signals_save_a_checkpoint(
    action, status, name, md, tmp_path, monkeypatch, capfd, unbroken
):
    with monkeypatch.context() as patch:
        stop_at(patch, 25, action)
        assert md("broken", "--checkpoint-every", "1000") == status
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"torchcall: md: stopped by {name} after step 25; ")
    assert "--restart" in line
    assert md("broken", "--restart") == 0
    assert contents(tmp_path / "broken") == unbroken


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_disturb_the_end(crystal, tmp_path):
    words = [*arguments(crystal), "--steps", "100000000"]
    command = [sys.executable, "-m", "torchcall", "md", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "md.csv"
    while not (log.exists() and log.read_text().count("\n") > 3) and process.poll() is None:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)  # the second one comes while files or the process are closed
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    (line,) = (line for line in printed.splitlines() if line and "step/s" not in line)
    assert line.startswith("torchcall: md: stopped by Ctrl-C after step ")
    assert line.endswith("--restart --log md.csv")


def test_a_full_disk_leaves_whole_files(md, tmp_path, monkeypatch, capfd, unbroken):
    count, pwrite = iter(range(10**9)), os.pwrite

    def full(file, data, at):
        if next(count) >= 15:
            if len(data) > 100:
                return pwrite(file, data[:100], at)  # the last free bytes
            raise OSError(28, "No space left on device")
        return pwrite(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwrite", full)
        assert md("broken") == 1
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    frames = ase.io.read(tmp_path / "broken" / "t.extxyz", ":")
    rows = (tmp_path / "broken" / "md.csv").read_text().splitlines()
    assert len(frames) in (len(rows) - 1, len(rows) - 2)
    assert md("broken", "--restart") == 0
    assert contents(tmp_path / "broken") == unbroken


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    write_whole(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_files_of_another_run_are_not_replaced(md, tmp_path, capfd):
    assert md("run", "--steps", "5") == 0
    before = contents(tmp_path / "run")
    assert md("run", "--steps", "5") == 2
    assert "--restart" in capfd.readouterr().err
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "t.h5").write_text("mine")
    assert md("run", "--steps", "5", "--log", "new.csv", "--traj", "t.h5") == 2
    assert "t.h5: exists already" in capfd.readouterr().err
    assert md("run", "--steps", "5", "--overwrite", "--ensemble", "nvt") == 0
    for options, text in [
        (("--seed", "7"), "--seed: expected 0 as in the run to continue, got 7"),
        # What is given must agree even where it is the default.
        (("--ensemble", "nve"), "--ensemble: expected nvt as in the run to continue, got nve"),
        (("--model", "7net-0"), "--model: expected None as in the run to continue, got 7net-0"),
        (("--steps", "0"), "--steps: expected a whole number, at least 1"),
        (("--log", "other.csv"), "other.checkpoint.npz: no such file"),
    ]:
        assert md("run", "--restart", *options) == 2
        assert text in capfd.readouterr().err
    (tmp_path / "run" / "md.csv").write_text("step\n")
    assert md("run", "--restart", "--steps", "10") == 2
    assert "that the checkpoint records" in capfd.readouterr().err
    (tmp_path / "run" / "md.checkpoint.npz").write_text("nonsense")
    assert md("run", "--restart") == 2
    assert "expected a checkpoint of torchcall md" in capfd.readouterr().err


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    md, tmp_path, monkeypatch, capfd, unbroken
):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            md("broken")
    assert md("broken", "--restart") == 2
    assert "ended before its first checkpoint; start it again with" in capfd.readouterr().err
    assert md("broken", "--overwrite") == 0
    assert contents(tmp_path / "broken") == unbroken


def test_another_structure_or_model_under_the_same_name_is_refused(
    crystal, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    argon = ase.io.read(crystal)
    argon_module(5.0).save("model.pt")
    argon.write("a.xyz")
    options = "--structure a.xyz --model model.pt --temperature 30 --threads 1 --steps 10"
    assert main(["md", *options.split()]) == 0
    weak = load_example("lennard_jones").LennardJones(0.005, cutoff=5.0, cell_gradients=True)
    neon = ase.Atoms("Ne32", argon.positions, cell=argon.cell, pbc=True)
    for change, expected in [
        (lambda: torch.jit.script(weak).save("model.pt"), "--model: expected the model of the run"),
        (lambda: neon.write("a.xyz"), "--structure a.xyz: expected the structure of the run to"),
        (lambda: argon[:31].write("a.xyz"), "expected the arrays of this structure"),
    ]:
        change()
        before = contents(tmp_path)
        assert main(["md", "--restart", "--steps", "20"]) == 2
        assert expected in capfd.readouterr().err.splitlines()[-1]
        assert contents(tmp_path) == before


class Scaled(torch.nn.Module):
    """Argon with a weight."""

    def __init__(self, scale):
        super().__init__()
        argon = load_example("lennard_jones").LennardJones(cutoff=5.0, cell_gradients=True)
        self.argon = argon
        self.scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = self.argon(input)
        out["energy"] = out["energy"] * self.scale
        return out


@pytest.mark.slow
def test_weights_that_hardly_change_energies_are_other_weights(
    crystal, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Scaled(1.0).eval()).save("model.pt")
    options = f"--structure {crystal} --model model.pt --cutoff 5 --threads 1 --every 5 --steps"
    assert main(["md", *options.split(), "5"]) == 0
    torch.jit.script(Scaled(1.0).eval()).save("model.pt")
    assert main(["md", "--restart", "--steps", "10"]) == 0
    torch.jit.script(Scaled(1.0 + 1e-6).eval()).save("model.pt")
    capfd.readouterr()
    assert main(["md", "--restart", "--steps", "15"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith("got one with other weights")


def test_two_runs_do_not_write_the_same_files(crystal, md, monkeypatch):
    def meanwhile():
        for options in (["--overwrite"], ["--restart"], ["--log", "b.csv", "--overwrite"]):
            command = [sys.executable, "-m", "torchcall", "md", *arguments(crystal), *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 2
            assert done.stderr.splitlines()[-1].endswith("another run is writing this file")

    with monkeypatch.context() as patch:
        stop_at(patch, 5, meanwhile)
        assert md("run", "--steps", "10") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--replicas", "2", "--devices", "2")], ids=["one device", "two devices"]
)
def test_sigterm_does_not_wait_for_a_long_record(options, crystal, tmp_path):
    steps = ("--steps", "100000000", "--every", "100000000")
    command = [sys.executable, "-m", "torchcall", "md", *arguments(crystal), *options, *steps]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "md.checkpoint.npz").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(4)  # now it compiles, or runs
    process.terminate()
    _, printed = process.communicate(timeout=60)
    last = printed.splitlines()[-1]
    assert process.returncode == 143, printed
    assert last.startswith("torchcall: md: stopped by SIGTERM after step 0; continue with")


@pytest.mark.slow
def test_replicas_on_two_devices_are_those_of_one(crystal, md, tmp_path):
    options = ("--replicas", "3", "--ensemble", "nvt", "--traj", "t.extxyz")
    assert md("one", *options) == 0
    (tmp_path / "two").mkdir()
    words = [*arguments(crystal), *options, "--devices", "2"]
    command = [sys.executable, "-m", "torchcall", "md", *words, "--steps", "30"]
    subprocess.run(command, cwd=tmp_path / "two", check=True, timeout=300)
    command = [*command[:4], "--restart", "--steps", "60"]
    subprocess.run(command, cwd=tmp_path / "two", check=True, timeout=300)
    one, two = (read_log(tmp_path / name / "md.csv") for name in ("one", "two"))
    for name, atol in (("total_ev", 1e-5), ("conserved_ev", 1e-5), ("temperature_k", 0.01)):
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=atol)
    assert len(contents(tmp_path / "two")) == 4


def killed_for_real(crystal, folder, seconds):
    """Starts a process, and kills it `seconds` after its first checkpoint."""
    folder.mkdir()
    command = [sys.executable, "-m", "torchcall", "md", *arguments(crystal, steps=400)]
    with (folder / "output").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while not (folder / "md.checkpoint.npz").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
        process.kill()
        status = process.wait(60)
    assert status in (-signal.SIGKILL, 0), (folder / "output").read_text()
    frames = ase.io.read(folder / "t.extxyz", ":")
    assert all(len(atoms) == 32 for atoms in frames)


@pytest.mark.slow
def test_sigkill_at_random_moments_50_times(crystal, md, tmp_path):
    assert md("unbroken", "--steps", "400") == 0
    random = np.random.default_rng(50)
    for k in range(50):
        folder = tmp_path / f"killed-{k}"
        killed_for_real(crystal, folder, random.uniform(0.0, 1.5))
        assert md(folder.name, "--restart", "--steps", "400") == 0
        assert contents(folder) == contents(tmp_path / "unbroken"), k
