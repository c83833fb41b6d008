"""Molecular dynamics of a structure under a PyTorch potential, in jitted loops.

Without options: 500 argon atoms at constant energy. A run that was killed continues bit for bit
with --restart.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from torchcall._command.files import check_unlocked
from torchcall._command.inputs import add_model, add_structure
from torchcall._command.parsing import CommandError, number, output_file, require

# What may differ when a run is continued.
_FREE = {"restart", "overwrite", "plot", "json", "log", "checkpoint_every"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `md`."""
    add_structure(parser)
    add_model(parser)
    add = parser.add_argument
    add(
        "--ensemble",
        choices=["nve", "nvt", "npt"],
        default="nve",
        help="what is constant: energy, temperature, or temperature and pressure (default: nve)",
    )
    add(
        "--thermostat",
        choices=["nose-hoover", "langevin"],
        default="nose-hoover",
        help="of nvt (default: nose-hoover). npt: nose-hoover",
    )
    add(
        "--temperature",
        type=number(least=0),
        metavar="K",
        help="of drawn velocities and the thermostat, in K (default: the file's velocities, and "
        "300 K where it has none)",
    )
    add("--pressure", type=number(), default=0.0, metavar="GPA", help="of npt, in GPa (default: 0)")
    add(
        "--friction",
        type=number(above=0),
        default=0.01,
        metavar="1/FS",
        help="of langevin, in 1/fs (default: 0.01)",
    )
    add(
        "--timestep",
        type=number(above=0),
        default=2.0,
        metavar="FS",
        help="in fs (default: 2; with hydrogen, at most 1)",
    )
    whole = number(least=1, kind=int)
    add(
        "--steps",
        type=whole,
        metavar="N",
        help="in total (default: 2000; with --restart, those of the run)",
    )
    add(
        "--every",
        type=whole,
        default=10,
        metavar="N",
        help="steps between rows of the log and frames of the trajectory; also between complete "
        "searches for neighbours (default: 10)",
    )
    add("--skin", type=number(above=0), default=1.0, metavar="Å", help="of the neighbour list (1)")
    add(
        "--seed",
        type=number(least=0, most=2**32 - 1, kind=int),
        default=0,
        metavar="N",
        help="of random numbers (default: 0)",
    )
    add(
        "--replicas",
        type=whole,
        default=1,
        metavar="N",
        help="copies, each with its own velocities, in one call of the model (default: 1)",
    )
    add(
        "--devices",
        type=whole,
        default=1,
        metavar="N",
        help="devices over which replicas are spread (default: 1)",
    )
    add(
        "--traj",
        type=output_file(".extxyz", ".xyz", ".h5"),
        metavar="FILE",
        help="trajectory, .extxyz (a file for each replica) or .h5 (default: none)",
    )
    add(
        "--log",
        type=output_file(".csv"),
        default=Path("md.csv"),
        metavar="FILE",
        help="table of energies, temperature, pressure (default: md.csv). The checkpoint is "
        "beside it, .checkpoint.npz",
    )
    add(
        "--plot",
        type=output_file(".png", ".pdf", ".svg"),
        metavar="FILE",
        help="picture of the log (default: the log's name with .png)",
    )
    add("--json", type=output_file(), metavar="FILE", help="write a summary to FILE")
    add(
        "--checkpoint-every",
        type=number(least=0),
        default=10.0,
        metavar="S",
        help="seconds between checkpoints (default: 10)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--restart",
        action="store_true",
        help="continue from the checkpoint of --log up to --steps; other options are the run's own",
    )
    again.add_argument(
        "--overwrite", action="store_true", help="start again, and replace files of an earlier run"
    )
    # Later, to know what was given on the command line.
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace) -> int:
    """Runs or continues a simulation. Returns the exit status."""
    check(options)
    if options.devices > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Before JAX is imported: importing jax-md makes the devices.
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(options.devices))
    from torchcall.md.command import run as simulate

    return simulate(options)


def check(options: argparse.Namespace) -> None:
    """Checks what takes no slow imports, and completes the options.

    Raises:
        CommandError: Options contradict each other, files exist, or a package is missing.
    """
    options.checkpoint = options.log.with_suffix(".checkpoint.npz")
    if options.plot is None:
        options.plot = options.log.with_suffix(".png")
    for package, purpose in (("jax_md", "md"), ("ase", "md"), ("tqdm", "the progress bar")):
        require(package, purpose, "md")
    require("matplotlib", "the plot", "md")
    if options.restart:
        _take_stored(options)
    elif options.steps is None:
        options.steps = 2000
    _check_ensemble(options)
    if options.steps % options.every:
        raise CommandError(
            f"--steps: expected a multiple of --every {options.every}, got {options.steps}"
        )
    if options.devices > options.replicas:
        raise CommandError(
            f"--devices: expected at most the number of replicas, {options.replicas}, got "
            f"{options.devices}"
        )
    if options.traj is not None and options.traj.suffix == ".h5":
        require("h5py", "--traj *.h5", "md")
    _check_files(options)


def _check_ensemble(options: argparse.Namespace) -> None:
    """Checks that no option is without effect."""
    given = options.parser.given()
    for name, wanted, used in (
        ("thermostat", "--ensemble nvt or npt", options.ensemble != "nve"),
        ("pressure", "--ensemble npt", options.ensemble == "npt"),
        ("friction", "--thermostat langevin", options.thermostat == "langevin"),
    ):
        if name in given and not used:
            raise CommandError(f"--{name}: expected {wanted} beside it, got {options.ensemble}")
    if options.ensemble == "npt" and options.thermostat == "langevin":
        raise CommandError("--thermostat langevin: expected nose-hoover for npt")
    if options.temperature == 0 and options.ensemble != "nve":
        raise CommandError("--temperature: expected a number above 0 for a thermostat, got 0")


def _check_files(options: argparse.Namespace) -> None:
    """Checks that no other run writes these files, and that none is replaced without `--overwrite`.

    Raises:
        CommandError, ValueError: See above.
    """
    files = [options.log, *trajectories(options)]
    used: dict[Path, str] = {}
    for name in ("structure", "model", "log", "checkpoint", "traj", "plot", "json"):
        path = getattr(options, name)
        if path is None:
            continue
        other = used.setdefault(Path(path).resolve(), name)
        if other != name:
            raise CommandError(f"--{name}: expected another file than --{other}, got {path}")
    for path in files:
        check_unlocked(path)
    if options.restart or options.overwrite:
        return
    if options.checkpoint.exists():
        raise CommandError(
            f"{options.checkpoint}: exists already; continue that run with --restart, replace it "
            "with --overwrite, or choose another --log"
        )
    for path in [*files, *([options.traj] if options.traj else [])]:
        if path.exists():
            raise CommandError(
                f"{path}: exists already; replace it with --overwrite, or choose another name"
            )


def trajectories(options: argparse.Namespace) -> list[Path]:
    """The files to which frames are appended: one for each replica, or one for HDF5."""
    if options.traj is None:
        return []
    if options.traj.suffix == ".h5":
        return [options.traj.with_name(options.traj.name + ".part")]
    if options.replicas == 1:
        return [options.traj]
    stem, suffix = options.traj.stem, options.traj.suffix
    return [options.traj.with_name(f"{stem}-{k}{suffix}") for k in range(options.replicas)]


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint records, as JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _FREE | {"parser", "checkpoint"}
    }


def _take_stored(options: argparse.Namespace) -> None:
    """Takes the run's own options; those that were given must agree with them."""
    if not options.checkpoint.is_file():
        advice = "--log names the run to continue"
        if options.log.is_file():
            advice = "that run ended before its first checkpoint; start it again with --overwrite"
        raise CommandError(f"--restart: {options.checkpoint}: no such file; {advice}")
    import zipfile

    # As `torchcall.md.checkpoint.read`, without NumPy.
    try:
        with zipfile.ZipFile(options.checkpoint) as archive, archive.open("text.npy") as file:
            data = file.read()
        found = json.loads(data[data.index(b"\n") + 1 :].decode())["options"]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CommandError(
            f"--restart: {options.checkpoint}: expected a checkpoint of torchcall md: {error}"
        ) from error
    given, now = options.parser.given(), stored(options)
    value: Any
    for name, value in found.items():
        if name == "steps":
            value = options.steps or value
        elif name in given and now[name] not in (value, "auto"):
            raise CommandError(
                f"--{name}: expected {value} as in the run to continue, got {now[name]}"
            )
        if name in ("structure", "traj") and value is not None:
            value = Path(value)
        setattr(options, name, value)
