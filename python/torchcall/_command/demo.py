"""Molecular dynamics of 500 argon atoms: `torchcall md` with its defaults.

Then times the same steps through JAX's own callbacks.
"""

import argparse
import tempfile
from pathlib import Path

from torchcall._command import md
from torchcall._command.parsing import Parser, number, output_file


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `demo`."""
    add = parser.add_argument
    whole = number(least=1, kind=int)
    add("--steps", type=whole, default=2000, metavar="N", help="a multiple of 100 (default: 2000)")
    add(
        "--plot",
        type=output_file(".png", ".pdf", ".svg"),
        default=Path("demo.png"),
        metavar="FILE",
        help="picture of energies, temperature and pressure (default: demo.png)",
    )
    add("--json", type=output_file(), metavar="FILE", help="write a summary to FILE")
    add("--no-peers", action="store_true", help="leave buffer_callback and pure_callback out")


def run(options: argparse.Namespace) -> int:
    """Runs `md`, then the comparison."""
    with tempfile.TemporaryDirectory(prefix="torchcall-demo-") as folder:
        parser = Parser("demo", "")
        md.add_options(parser)
        log = Path(folder) / "md.csv"
        words = f"--steps {options.steps} --every 100 --skin 1".split()
        simulated = parser.parse_args([*words, "--log", str(log), "--plot", str(options.plot)])
        simulated.json = options.json
        md.check(simulated)
        from torchcall.md.command import demo

        return demo(simulated, peers=not options.no_peers)
