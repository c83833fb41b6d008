"""Relax atoms, or atoms and cell, under a potential, and write the structure (FIRE).

If the steps do not suffice, or after Ctrl-C, it writes the last structure and exits with status 1
(130 after Ctrl-C): continue with --structure THAT_FILE.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcall._command.energy import calculator, evaluated, table
from torchcall._command.files import replacing
from torchcall._command.included import included_file
from torchcall._command.inputs import add_model, add_structure, read_structure
from torchcall._command.parsing import CommandError, number, output_file, require

if TYPE_CHECKING:
    import ase

# Constraints of ASE under which an atom moves with the cell and not otherwise.
_FIXED = {"FixAtoms", "FixCartesian", "FixScaled"}
_WITH_CELL = {*_FIXED, "FixSymmetry"}
# Seconds between two lines of progress.
_EVERY = 1.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `relax`."""
    add_structure(parser)
    add_model(parser)
    add = parser.add_argument
    add("--cell", action="store_true", help="relax the cell, too; needs three periodic axes")
    add(
        "--fmax",
        type=number(above=0),
        default=0.01,
        metavar="EV/Å",
        help="converged when no force is larger, in eV/Å (default: 0.01)",
    )
    add(
        "--smax",
        type=number(above=0),
        metavar="EV/Å³",
        help="and, with --cell, no stress component is, in eV/Å³ (default: 1e-4, 16 MPa)",
    )
    add(
        "--steps",
        type=number(least=1, kind=int),
        default=1000,
        metavar="N",
        help="at most (default: 1000)",
    )
    add(
        "--out",
        type=output_file(),
        default=Path("relaxed.extxyz"),
        metavar="FILE",
        help="the relaxed structure, in any format that ASE writes (default: relaxed.extxyz)",
    )


def run(options: argparse.Namespace) -> int:
    """Relaxes and writes the structure."""
    if options.smax is not None and not options.cell:
        raise CommandError("--smax: expected --cell beside it, because only then the cell relaxes")
    smax = 1e-4 if options.smax is None else options.smax
    form = _format(options.out)
    atoms = read_structure(options.structure or included_file("argon.xyz"))
    if options.cell and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise CommandError(f"--cell: expected three periodic axes, got pbc {atoms.pbc.tolist()}")
    if options.cell:
        _check_constraints(atoms)
    _write(atoms, options.out, form, keep=False)  # what the format cannot hold is an error now
    atoms.calc = calculator(options)
    step, reason, status = _relaxed(atoms, options, smax)
    _write(atoms, options.out, form)
    if status:
        raise CommandError(f"{reason}; wrote the last structure to {options.out}", status=status)
    print(table(atoms, evaluated(atoms, constrained=True)), end="")
    print(f"torchcall: relax: converged after {step} steps; wrote {options.out}", file=sys.stderr)
    return 0


def _check_constraints(atoms: "ase.Atoms") -> None:
    """Reports how constraints act when the cell changes.

    Raises:
        CommandError: They are not defined then.
    """
    kinds = {type(each).__name__ for each in atoms.constraints}
    if other := kinds - _WITH_CELL:
        known, found = (", ".join(sorted(names)) for names in (_WITH_CELL, other))
        raise CommandError(
            f"--cell: expected constraints that a changing cell keeps ({known}), got {found}; "
            "relax without --cell, or remove them"
        )
    if kinds & _FIXED:
        print(
            "torchcall: relax: with --cell, fixed atoms keep their fractional coordinates and move "
            "with the cell",
            file=sys.stderr,
        )


def _relaxed(atoms: "ase.Atoms", options: argparse.Namespace, smax: float) -> tuple[int, str, int]:
    """Runs FIRE. Returns the steps done, and why it ended early with the exit status, or 0."""
    import numpy as np
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE

    evaluated(atoms)  # refuses a structure with infinite forces before it is moved
    moved: Any = FrechetCellFilter(atoms) if options.cell else atoms
    optimizer: Any = FIRE(moved, logfile=None)  # pyright: ignore[reportArgumentType]
    before = {"positions": atoms.positions.copy(), "cell": atoms.cell.copy()}
    step, last, state = 0, -np.inf, ""
    try:
        for step, _ in enumerate(optimizer.irun(fmax=0.0, steps=options.steps)):
            energy, force = atoms.get_potential_energy(), _largest(atoms.get_forces())
            stress = float(np.abs(atoms.get_stress()).max()) if options.cell else 0.0
            if not np.isfinite([energy, force, stress]).all():
                atoms.calc = None
                atoms.set_cell(before["cell"])
                atoms.set_positions(before["positions"])
                return step, f"step {step}: expected finite forces, got NaN or infinity", 1
            before = {"positions": atoms.positions.copy(), "cell": atoms.cell.copy()}
            state = f"largest force {force:.4g} eV/Å" + (
                f", largest stress {stress:.3g} eV/Å³" if options.cell else ""
            )
            if force <= options.fmax and stress <= smax:
                return step, "", 0
            if time.monotonic() - last > _EVERY:
                last = time.monotonic()
                print(f"step {step:>5}  energy {energy:.6f} eV  {state}", file=sys.stderr)
    except KeyboardInterrupt:
        return step, f"interrupted at step {step}", 130
    wanted = f"{options.fmax:g} eV/Å" + (f" and {smax:g} eV/Å³" if options.cell else "")
    return step, f"not converged after {step} steps: {state}, expected at most {wanted}", 1


def _largest(forces: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(forces, axis=1).max())


def _format(path: Path) -> str:
    """The format in which ASE writes a file of this name.

    Raises:
        CommandError: ASE is missing or knows none.
    """
    require("ase", "reading a structure", "md")
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        name = filetype(str(path), read=False)
    except UnknownFileTypeError:
        name = ""
    if name not in ioformats or not ioformats[name].can_write:
        raise CommandError(f"--out {path}: expected a name with a format that ASE writes")
    return name


def _write(atoms: "ase.Atoms", path: Path, form: str, *, keep: bool = True) -> None:
    """Writes the structure whole or not at all.

    Args:
        atoms: The structure.
        path: The file.
        form: ASE's name of its format.
        keep: False only tries it.

    Raises:
        CommandError: It cannot be written.
    """
    import ase.io

    try:
        with replacing(path) as temporary:
            ase.io.write(temporary, atoms, format=form)
            if not keep:
                raise _Tried
    except _Tried:
        pass
    except Exception as error:  # formats have requirements of their own
        raise CommandError(f"--out {path}: cannot be written: {error}", status=1) from error


class _Tried(Exception):
    """Ends a trial, so that nothing is replaced."""
