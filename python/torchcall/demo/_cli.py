"""The demo's command line: options and one-line errors."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from torchcall.demo._system import DemoError

_DESCRIPTION = """Molecular dynamics (NVE, velocity Verlet) of a structure under a TorchScript
potential, in one jitted lax.scan; then the same loop through JAX's own callbacks.
Defaults are in brackets."""

_EPILOG = """A model is a TorchScript module that takes an AtomGraphInput and returns a dict with
energy (B,) in eV and position_gradients (N, 3) in eV/Å. For example,
`python examples/lennard_jones.py lj.pt` writes a Lennard-Jones model."""


_TEMPERATURE = "draw velocities at this temperature (the file's velocities, else 94.4 K)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise DemoError(f"{message} (see python -m torchcall demo --help)")


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _not_below_zero(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number not below 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def _options(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m torchcall demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    # argparse names a type by its __name__ when float() or int() raises.
    for kind, name in ((_above_zero, "number"), (_not_below_zero, "number"), (_count, "number")):
        kind.__name__ = name
    add = parser.add_argument
    add("--structure", type=Path, metavar="FILE", help="anything ase reads (500 argon atoms)")
    add("--model", type=Path, metavar="FILE", help="TorchScript archive (Lennard-Jones argon)")
    add("--steps", type=_count, default=2000, metavar="N", help="number of steps (2000)")
    add("--dt", type=_above_zero, default=2.0, metavar="FS", help="time step in fs (2)")
    add("--temperature", type=_not_below_zero, metavar="K", help=_TEMPERATURE)
    add("--cutoff", type=_above_zero, default=8.5, metavar="Å", help="cutoff of the model (8.5)")
    add("--skin", type=_not_below_zero, default=1.0, metavar="Å", help="neighbour list's skin (1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the velocities (0)")
    add("--float64", action="store_true", help="double precision in JAX and the model's inputs")
    add("--picture", type=Path, metavar="FILE", help="plot of energies and temperature (demo.png)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    add("--no-peers", action="store_true", help="skip buffer_callback and pure_callback")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the demo.

    Args:
        argv: The options, without the command's name.

    Returns:
        0; or 2 after a one-line error on stderr.
    """
    try:
        options = _options(argv)
    except DemoError as error:
        return _fail(str(error))
    except SystemExit as leaving:  # --help
        return int(leaving.code or 0)
    try:
        import jax

        from torchcall.demo._run import run

        with jax.enable_x64(True) if options.float64 else nullcontext():
            run(options)
    except DemoError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except Exception as error:
        # Errors of the model or its file start with "torchcall:". Anything else is a bug in the
        # demo and needs its traceback.
        _, prefix, reason = str(error).partition("torchcall:")
        if not prefix:
            raise
        return _fail(reason.strip())
    return 0


def _fail(reason: str) -> int:
    print(f"torchcall: {reason}", file=sys.stderr)
    return 2
