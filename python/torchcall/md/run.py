"""A simulation with its files, from the options to the last line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from ase import units

import torchcall
from torchcall._command.files import remove_temporaries
from torchcall._command.included import included_file
from torchcall._command.inputs import load_model, read_structure
from torchcall._command.md import stored, trajectories
from torchcall._command.parsing import PROGRAM, CommandError
from torchcall.md.checkpoint import Checkpoint, packed, read
from torchcall.md.ensembles import Settings, keys
from torchcall.md.explosion import is_sound
from torchcall.md.files import (
    AppendFile,
    extxyz,
    log_header,
    log_rows,
    raw_frame,
    write_hdf5,
)
from torchcall.md.progress import Progress
from torchcall.md.report import Summary, draw, read_log, write_json
from torchcall.md.simulation import Frame, Group, Simulation
from torchcall.md.stop import explain, explode
from torchcall.md.system import System, initial_momenta
from torchcall.md.weights import weights_record
from torchcall.mliap import RunError, TorchMliap


class Done(NamedTuple):
    """What is complete, and what a checkpoint describes: replaced as one, after each record.

    Attributes:
        step: Steps done.
        groups: The replicas of each device.
        frame: All replicas.
        lengths: Of the files, by name.
    """

    step: int
    groups: list[Group]
    frame: Frame
    lengths: dict[str, int]


class Run:
    """A simulation with its files.

    Attributes:
        simulation: The compiled functions.
        done: The last complete record.
        seconds, timed: Of how many steps, without compilation.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        checkpoint = read(options.checkpoint) if options.restart else None
        if checkpoint is not None and checkpoint.step > options.steps:
            raise CommandError(
                f"--steps: expected at least the {checkpoint.step} steps that were made, got "
                f"{options.steps}"
            )
        self.system = self._read_system()
        self.model = load_model(options)
        self.simulation = self.simulation_of(self.model)
        threads = self._choose_threads() if options.threads == "auto" else options.threads
        torchcall.set_num_threads(threads)
        if threads > 1:
            # Sums of several threads in any order would differ from run to run.
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._weights = weights_record(self.model.wrapper)
        self.seconds, self.timed, self._saved = 0.0, 0, 0.0
        groups, step = self._initial_groups(), 0
        for group in groups:
            self.simulation.warm_up(group.neighbors)
        names = ["log", *map(str, range(len(trajectories(options))))]
        lengths = checkpoint.lengths if checkpoint is not None else dict.fromkeys(names, 0)
        if checkpoint is not None:
            groups = checkpoint.continued(self.simulation, groups, options)
            step = checkpoint.step
        frame = self._observe(groups)
        if not (np.isfinite(frame.potential).all() and np.isfinite(frame.forces).all()):
            raise CommandError(
                f"--structure {options.structure}: expected finite energies and forces, got NaN or "
                "infinity; do atoms overlap?"
            )
        self.files = self._open(lengths)
        self.done = Done(step, groups, frame, lengths)
        self._start = step
        if checkpoint is None:
            self._stop_early(self._begin)

    def _open(self, lengths: dict[str, int]) -> dict[str, AppendFile]:
        """The files to append to; what an earlier run left is removed once all are locked."""
        options = self.options
        paths = [options.log, *trajectories(options)]
        with ExitStack() as stack:
            files = {}
            try:
                for path, (name, length) in zip(paths, lengths.items(), strict=True):
                    files[name] = AppendFile(path, length)
                    stack.callback(files[name].close)
                remove_temporaries(options.checkpoint)
                if not options.restart:
                    options.checkpoint.unlink(missing_ok=True)
                for file in files.values():
                    file.cut()
            except OSError as error:
                raise CommandError(f"{error.filename}: {error.strerror}") from error
            stack.pop_all()
        return files

    def simulate(self) -> None:
        """Makes the remaining steps.

        Raises:
            CommandError: The run stopped early. A checkpoint of its last record is written if the
                disk has room.
        """
        options = self.options
        with (
            ThreadPoolExecutor(options.devices) as pool,
            Progress(self.step, options.steps, options.timestep, len(self.system.numbers)) as bar,
        ):

            def steps() -> None:
                while self.step < options.steps:
                    begun, compiled = time.perf_counter(), self.step > self._start
                    self.record(pool)
                    if compiled:  # the first record is compiled
                        self.seconds += time.perf_counter() - begun
                        self.timed += options.every
                    bar.show(self.step, self.done.frame)
                    if time.perf_counter() - self._saved >= options.checkpoint_every:
                        self.save()
                self.save()

            self._stop_early(steps)

    def report(
        self,
        *,
        written: list[Path] | None = None,
        follow: str | None = None,
        rows: list[dict[str, Any]] | None = None,
    ) -> None:
        """Writes plot, summary and the last line.

        Args:
            written: Files to name; None: all.
            follow: What to try next; None: a longer run.
            rows: Timings for the summary.
        """
        options, n_atoms = self.options, len(self.system.numbers)
        try:
            self._close()
        except OSError as error:
            explain(error, self.step, options.log)
        log = read_log(options.log)
        summary = Summary.of(log, n_atoms)
        rate = self.timed / self.seconds if self.timed else float("nan")
        print(summary.text())
        if self.timed:
            per_day = rate * 86400 * options.timestep * 1e-6
            print(f"  speed           {rate:.4g} steps/s, {per_day:.3g} ns/day")
        draw(options.plot, log, summary, self.title, n_atoms)
        if written is None:
            written = [options.log, *self._trajectory_files(), options.plot, options.checkpoint]
        if options.json is not None:
            write_json(
                options.json, summary, rows or [], steps=self.step, atoms=n_atoms,
                replicas=options.replicas, steps_per_second=rate, case=self.title,
                engine=self.model.wrapper.stats()["engine"],
            )  # fmt: skip
            written = [*written, options.json]
        if follow is None:
            follow = f"{PROGRAM} md --restart --steps {2 * self.step}"
            if options.log != Path("md.csv"):
                follow += f" --log {options.log}"
        print(
            f"\n{self.title}: {self.step * options.timestep * 1e-3:g} ps. Wrote "
            f"{', '.join(map(str, written))}. Try next: {follow}",
            flush=True,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self.done.step

    @property
    def title(self) -> str:
        """Structure, model and ensemble."""
        options = self.options
        model = options.model or "Lennard-Jones argon"
        copies = f"{options.replicas} × " if options.replicas > 1 else ""
        ensemble = options.ensemble.upper()
        if options.ensemble == "nvt":
            ensemble += f" ({options.thermostat})"
        return (
            f"{copies}{self.system.formula}, {Path(str(model)).name}, {ensemble}, "
            f"{options.timestep:g} fs"
        )

    def _read_system(self) -> System:
        options = self.options
        path = options.structure or included_file("argon.xyz")
        atoms = read_structure(path)
        if atoms.constraints:
            kinds = ", ".join(sorted({type(each).__name__ for each in atoms.constraints}))
            raise CommandError(
                f"--structure {path}: expected no constraints, which md would ignore, got {kinds}; "
                "remove them, or use ASE's dynamics with torchcall.integrations.ase"
            )
        system = System.from_ase(atoms)
        if options.ensemble == "npt" and not system.pbc.all():
            raise CommandError(
                f"--ensemble npt: expected a structure that is periodic along all three axes, got "
                f"pbc {system.pbc.tolist()}"
            )
        return system

    def simulation_of(self, model: TorchMliap) -> Simulation:
        """The run's simulation, by this model."""
        options = self.options
        if options.ensemble == "npt" and not model.compute_cell_gradients:
            raise CommandError("--ensemble npt: expected a model with cell gradients")
        settings = Settings(
            options.ensemble,
            options.thermostat,
            options.timestep * units.fs,
            self._kelvin * units.kB,
            options.pressure * units.GPa,
            options.friction / units.fs,
        )
        return Simulation(
            model,
            self.system,
            settings,
            every=options.every,
            skin=options.skin,
            dtype=np.dtype(options.dtype or "float32"),
            kb=units.kB,
        )

    @property
    def _kelvin(self) -> float:
        """The thermostat's temperature."""
        if self.options.temperature is not None:
            return self.options.temperature
        velocities = self.system.velocities
        if velocities is None:
            return 300.0
        twice_kinetic = (self.system.masses[:, None] * velocities**2).sum()
        return float(twice_kinetic / (max(1, 3 * len(velocities) - 3) * units.kB))

    def _initial_groups(self) -> list[Group]:
        options = self.options
        own = self.system.velocities is not None and options.temperature is None
        momenta = initial_momenta(
            self.system,
            options.replicas,
            thermal_energy=None if own and options.replicas == 1 else self._kelvin * units.kB,
            seed=options.seed,
        )
        random = keys(options.seed, options.replicas)
        groups = []
        for device, part in zip(
            jax.devices()[: options.devices],
            np.array_split(np.arange(options.replicas), options.devices),
            strict=True,
        ):
            with jax.default_device(device), _advice(options):
                groups.append(self.simulation.start(momenta[part], random[part]))
        return groups

    def _choose_threads(self) -> int:
        """Measures how many torch threads are best, and loads the model again for that number."""
        options = self.options
        replicas = -(-options.replicas // options.devices)
        with _advice(options):
            neighbors = self.simulation.search.allocate(*self.simulation.geometry(replicas))
        self.simulation.warm_up(neighbors, calls=1)
        found = self.model.wrapper.stats()["measured_threads"]
        options.threads = found[-1]["threads"] if found else torch.get_num_threads()
        self.model = load_model(options, verbose=False)
        self.simulation = self.simulation_of(self.model)
        return options.threads

    def _begin(self) -> None:
        """The first row, frame and checkpoint."""
        self.files["log"].append(log_header())
        self._write_record(0, self.done.groups, self.done.frame)
        self.save()

    def record(self, pool: ThreadPoolExecutor) -> None:
        """Makes `every` steps, and writes their row and frame."""
        before = self.done.groups
        try:
            if len(before) == 1:
                groups = [self.simulation.advance(before[0])]
            else:
                groups = list(pool.map(self._advance_in_thread, before))
            frame = self._observe(groups)
        except RunError:
            explode(self.options, self.system, self.simulation, self.step, before)
        if not is_sound(self.system, frame, self.options.timestep * units.fs):
            explode(self.options, self.system, self.simulation, self.step, before)
        self._write_record(self.step + self.options.every, groups, frame)

    def _advance_in_thread(self, group: Group) -> Group:
        # Settings of JAX belong to a thread.
        with jax.enable_x64(self.options.dtype == "float64"):
            return self.simulation.advance(group)

    def _observe(self, groups: list[Group]) -> Frame:
        frames = [self.simulation.frame(group) for group in groups]
        if len(frames) == 1:
            return frames[0]
        return Frame(*(np.concatenate(parts) for parts in zip(*frames, strict=True)))

    def _write_record(self, step: int, groups: list[Group], frame: Frame) -> None:
        options = self.options
        time_ps = step * options.timestep * 1e-3
        self.files["log"].append(log_rows(step, time_ps, frame, units.GPa))
        for number in range(len(trajectories(options))):
            if options.traj.suffix == ".h5":
                data = raw_frame(step, time_ps, frame)
            else:
                data = extxyz(self.system, frame, number, step=step, time_ps=time_ps)
            self.files[str(number)].append(data)
        lengths = {name: file.length for name, file in self.files.items()}
        self.done = Done(step, groups, frame, lengths)

    def save(self) -> None:
        """Writes the checkpoint of the last complete record."""
        done = self.done
        for file in self.files.values():
            file.sync()
        groups = [packed(group) for group in done.groups]
        Checkpoint(done.step, stored(self.options), done.lengths, groups, self._weights).write(
            self.options.checkpoint
        )
        self._saved = time.perf_counter()

    def _stop_early(self, work: Any) -> None:
        """Runs `work`; whatever ends it, first saves what is complete."""
        try:
            work()
        except BaseException as error:
            failed = None
            on_disk = isinstance(error, OSError) and error.errno
            if not on_disk or isinstance(error, BrokenPipeError):
                try:
                    self.save()
                except OSError as disk:
                    failed = disk
            with suppress(OSError):
                self._close()
            explain(failed or error, self.step, self.options.log)

    def _trajectory_files(self) -> list[Path]:
        traj = self.options.traj
        return [traj] if traj is not None and traj.suffix == ".h5" else trajectories(self.options)

    def _close(self) -> None:
        """Closes the files; makes the HDF5 file.

        Raises:
            OSError: It cannot be written. The frames stay where they are.
        """
        for file in self.files.values():
            file.close()
        traj = self.options.traj
        if traj is not None and traj.suffix == ".h5":
            write_hdf5(trajectories(self.options)[0], traj, self.system)


@contextmanager
def _advice(options: argparse.Namespace) -> Iterator[None]:
    """Errors of the neighbour list name the structure."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("torchcall: ")
        raise CommandError(f"--structure {options.structure or 'argon.xyz'}: {text}") from error
