"""`torchcall md`: what ends a run from outside, in a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

from torchcall._command.included import load_example, quiet_torchscript

OPTIONS = (
    "--structure ../crystal.xyz --model ../large.pt --cutoff 5 --temperature 30 --threads 1 "
    "--every 5 --skin 0.6 --steps 100 --traj t.extxyz --checkpoint-every 1000"
)
LOST_SIGNALS = """
import os, signal
from argparse import Namespace
from torchcall.md.process import process_settings
with process_settings(Namespace(devices=1, dtype=None)):
    for k in range(3):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            print("lost", k, flush=True)
        else:
            print("ignored", k, flush=True)
"""


def test_the_third_sigterm_ends_a_process_that_lost_the_first():
    command = [sys.executable, "-c", LOST_SIGNALS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "lost 0\nignored 1\n")


class Large(torch.nn.Module):
    """Argon that takes 120 MB in each call."""

    def __init__(self):
        super().__init__()
        self.argon = load_example("lennard_jones").LennardJones(cutoff=5.0, cell_gradients=True)

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = self.argon(input)
        out["energy"] = out["energy"] + torch.zeros(30_000_000)[0]
        return out


@pytest.mark.slow
def test_a_run_without_memory_leaves_whole_files_and_continues_bit_for_bit(tmp_path):
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True).repeat(2)
    atoms.rattle(0.05, rng=np.random.default_rng(1))
    atoms.write(tmp_path / "crystal.xyz")
    with quiet_torchscript():
        torch.jit.script(Large().eval()).save(tmp_path / "large.pt")
    command = [sys.executable, "-m", "torchcall", "md"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    subprocess.run([*command, *OPTIONS.split()], cwd=whole, check=True, timeout=300)

    process = subprocess.Popen(
        [*command, *OPTIONS.split()], cwd=broken, stderr=subprocess.PIPE, text=True
    )
    log = broken / "md.csv"
    while not (log.exists() and log.read_text().count("\n") > 3) and process.poll() is None:
        time.sleep(0.01)
    # What it has between two calls, and 8 MiB more: it fails at its next call.
    pages = 1 << 60
    for _ in range(50):
        pages = min(pages, int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]))
        time.sleep(0.01)
    limit = f"--as={pages * 4096 + 2**23}:"
    subprocess.run(["prlimit", f"--pid={process.pid}", limit], check=True)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "torchcall: md: out of memory after step " in printed.splitlines()[-1]
    assert all(len(frame) == 32 for frame in ase.io.read(broken / "t.extxyz", ":"))
    subprocess.run([*command, "--restart"], cwd=broken, check=True, timeout=300)
    for name in ("md.csv", "t.extxyz"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
