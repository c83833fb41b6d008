"""Energy, forces, stress and pressure of one structure under a potential.

Stress and pressure are static: without the motion of the atoms. The stress has ASE's sign,
+(1/V) dE/dstrain; the pressure is minus a third of its trace.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from torchcall._command.files import write_output
from torchcall._command.included import included_file
from torchcall._command.inputs import add_model, add_structure, load_model, read_structure
from torchcall._command.parsing import CommandError, output_file

if TYPE_CHECKING:
    import ase

# Of structures up to this size the table has all forces.
_FORCES_OF = 20
_VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `energy`."""
    add_structure(parser)
    add_model(parser)
    parser.add_argument(
        "--json",
        type=lambda text: text if text == "-" else output_file()(text),
        metavar="FILE",
        help="also write the results, with all forces, to a file; -: print them instead of the "
        "table. In eV, eV/Å and eV/Å³",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the table or writes the JSON."""
    atoms = read_structure(options.structure or included_file("argon.xyz"))
    if options.threads == "auto":
        options.threads = None  # measuring takes longer than one call
    atoms.calc = calculator(options)
    result = evaluated(atoms)
    text = json.dumps(result, indent=1) + "\n"
    if options.json == "-":
        print(text, end="")
        return 0
    print(table(atoms, result), end="")
    if options.json:
        write_output("--json", options.json, text.encode())
        print(f"torchcall: energy: wrote {options.json}", file=sys.stderr)
    return 0


def calculator(options: argparse.Namespace) -> Any:
    """A calculator of the model that the options name."""
    from torchcall._compilation_cache import use_compilation_cache
    from torchcall.integrations.ase import Calculator

    use_compilation_cache()
    return Calculator(load_model(options))


def evaluated(atoms: "ase.Atoms", *, constrained: bool = False) -> dict[str, Any]:
    """Energy, forces and, where they are defined, stress and pressure, as JSON has them.

    Args:
        atoms: The structure, with a calculator.
        constrained: Whether its constraints act on the forces.

    Raises:
        CommandError: The energy or a force is not finite.
    """
    import numpy as np

    energy, forces = atoms.get_potential_energy(), atoms.get_forces(constrained)
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        bad = int(np.argmin(np.isfinite(forces).all(1)))
        raise CommandError(
            f"expected a finite energy and finite forces, got energy {energy:g} eV and force "
            f"{forces[bad].tolist()} eV/Å on atom {bad} ({atoms.symbols[bad]}); do atoms overlap?",
            status=1,
        )
    result: dict[str, Any] = {
        "formula": str(atoms.symbols),
        "n_atoms": len(atoms),
        "energy": float(energy),
        "energy_per_atom": float(energy) / len(atoms),
        "max_force": float(np.linalg.norm(forces, axis=1).max()),
        "forces": forces.tolist(),
        "stress": None,
        "pressure": None,
    }
    calc: Any = atoms.calc
    if "stress" in calc.results:
        stress = atoms.get_stress(apply_constraint=constrained)
        result |= {
            "volume": atoms.get_volume(),
            "stress": dict(zip(_VOIGT, stress.tolist(), strict=True)),
            "pressure": -float(stress[:3].sum()) / 3,
        }
    return result


def table(atoms: "ase.Atoms", result: dict[str, Any]) -> str:
    """The results for people."""
    import numpy as np
    from ase.units import GPa

    worst = int(np.argmax(np.linalg.norm(result["forces"], axis=1)))
    rows = [
        ("structure", f"{result['formula']}, {result['n_atoms']} atoms"),
        ("energy", f"{result['energy']:.6f} eV"),
        ("energy per atom", f"{result['energy_per_atom']:.6f} eV"),
        ("largest force", f"{result['max_force']:.6f} eV/Å, atom {worst} ({atoms.symbols[worst]})"),
    ]
    if result["stress"]:
        named = "  ".join(f"{name} {value:.6f}" for name, value in result["stress"].items())
        pressure = result["pressure"]
        rows += [
            ("volume", f"{result['volume']:.3f} Å³"),
            ("stress", f"{named} eV/Å³"),
            ("pressure", f"{pressure:.6f} eV/Å³ = {pressure / GPa:.4f} GPa"),
        ]
    else:
        rows.append(("stress", "not defined without a cell of three vectors"))
    lines = [f"{name:<16} {value}" for name, value in rows]
    if len(atoms) <= _FORCES_OF:
        lines += ["", f"{'atom':<6}{'':<4}{'x':>12}{'y':>12}{'z':>12}   eV/Å"]
        lines += [
            f"{k:<6}{atoms.symbols[k]:<4}{x:12.6f}{y:12.6f}{z:12.6f}"
            for k, (x, y, z) in enumerate(result["forces"])
        ]
    return "\n".join(lines) + "\n"
