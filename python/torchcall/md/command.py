"""What `torchcall md` and `torchcall demo` run."""

from __future__ import annotations

import argparse

import jax
import torch

import torchcall
from torchcall._command.included import argon_module
from torchcall._command.parsing import PROGRAM
from torchcall.md.process import process_settings
from torchcall.md.run import Run

_TRY = f"{PROGRAM} md --structure YOUR.cif --model 7net-0 --ensemble nvt --temperature 300"


def run(options: argparse.Namespace) -> int:
    """Runs or continues a simulation; see `torchcall._command.md` for the options.

    Returns:
        0.

    Raises:
        CommandError: Something that the user can fix; or the run stopped early, with status 1, or
            130 and 143 after Ctrl-C and SIGTERM.
    """
    with process_settings(options):
        run_ = Run(options)
        run_.simulate()
        run_.report()
    return 0


def demo(options: argparse.Namespace, *, peers: bool) -> int:
    """`run`, and the comparison with JAX's callbacks.

    Returns:
        0.

    Raises:
        CommandError: As `run`.
    """
    from torchcall.demo._compare import compare, rows, timing_table

    with process_settings(options):
        print(
            f"torchcall {torchcall.__version__}, jax {jax.__version__}, torch {torch.__version__}; "
            "jax-md's velocity Verlet in jitted loops",
            flush=True,
        )
        run_ = Run(options)
        run_.simulate()
        found = []
        if peers:
            print(f"\ntiming: rounds of {options.every} steps by each method", flush=True)
            timings = compare(run_, argon_module())
            print(f"\n{timing_table(timings)}\n")
            found = rows(timings, len(run_.system.numbers))
        run_.report(written=[options.plot], follow=_TRY, rows=found)
    return 0
