"""What `md`, `relax` and `energy` share: the options of structure and model, and reading them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcall._command.included import argon, quiet_torchscript
from torchcall._command.parsing import CommandError, existing_file, number, require

if TYPE_CHECKING:
    import ase

    from torchcall.mliap import TorchMliap

_MODEL = """name of a pretrained network (7net-0, chgnet, ...) or file: a checkpoint, a TorchScript
archive, or a package of torchcall compile (default: Lennard-Jones argon)"""


def add_structure(parser: argparse.ArgumentParser) -> None:
    """Adds `--structure`."""
    parser.add_argument(
        "--structure",
        type=existing_file,
        metavar="FILE",
        help="anything that ASE reads; the last frame (default: 500 argon atoms)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--cutoff`, `--dtype`, `--engine` and `--threads`."""
    add = parser.add_argument
    add("--model", type=_model, metavar="NAME_OR_FILE", help=_MODEL)
    add(
        "--cutoff",
        type=number(above=0),
        metavar="Å",
        help="cutoff of a model that does not declare its own, in Å",
    )
    add(
        "--dtype",
        choices=["float32", "float64"],
        help="precision of positions and model (default: float32, and the model's own)",
    )
    add(
        "--engine",
        choices=["auto", "eager", "script", "package"],
        default="auto",
        help="how the model runs (default: auto). package: compiled once, for minutes; fastest",
    )
    add(
        "--threads",
        type=_threads,
        default="auto",
        metavar="N",
        help="torch threads in a call of the model, or auto: measured at the start (default)",
    )


def read_structure(path: Path, option: str = "--structure") -> "ase.Atoms":
    """The last frame of a structure file.

    Args:
        path: Any file that ASE reads.
        option: Where the path came from, for errors.

    Returns:
        At least one atom, with finite positions, positive masses, and a lattice vector for each
        periodic axis.

    Raises:
        CommandError: ASE is missing or cannot read the file, or the atoms cannot be used.
    """
    require("ase", "reading a structure", "md")
    import ase.io
    import numpy as np

    where = f"{option} {path}"
    try:
        atoms: Any = ase.io.read(path, index=-1)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(
            f"{where}: expected a structure that ASE reads, got {type(error).__name__}"
            f"{': ' if reason else ''}{reason}"
        ) from error
    if len(atoms) == 0:
        raise CommandError(f"{where}: expected atoms, got none")
    cell = np.asarray(atoms.cell[:])
    if not (np.isfinite(atoms.positions).all() and np.isfinite(cell).all()):
        raise CommandError(f"{where}: expected finite positions and cell, got NaN or infinity")
    if not np.linalg.norm(cell, axis=1)[atoms.pbc].all():
        raise CommandError(
            f"{where}: expected a lattice vector for each periodic axis, got zero; pbc "
            f"{atoms.pbc.tolist()}"
        )
    if not (atoms.get_masses() > 0).all():
        raise CommandError(f"{where}: expected positive masses, got {atoms.get_masses().min():g}")
    return atoms


def load_model(options: argparse.Namespace, **settings: Any) -> "TorchMliap":
    """The potential that the options name, with gradients by positions and cell.

    Args:
        options: Those of `add_model`.
        settings: Options of `torchcall.models.load`.

    Raises:
        ValueError, TypeError, ImportError, FileNotFoundError: As `torchcall.models.load`.
    """
    if options.model is None:
        return argon(options.cutoff, threads=options.threads, **settings)
    import torchcall

    if options.cutoff is not None:
        settings["cutoff"] = options.cutoff
    with quiet_torchscript():
        return torchcall.models.load(
            options.model,
            dtype=options.dtype,
            engine=options.engine,
            threads=options.threads,
            **settings,
        )


def _model(text: str) -> str:
    """A name, or the path of an existing file; whether a name is known takes slow imports."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a name or a file, got a folder")
    if not path.exists() and (len(path.parts) > 1 or path.suffix.lower() in _SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return text


_SUFFIXES = (".pt", ".pt2", ".pth", ".model", ".ckpt", ".tar", ".zip", ".jit")


def _threads(text: str) -> int | str:
    return text if text == "auto" else number(least=1, kind=int)(text)
