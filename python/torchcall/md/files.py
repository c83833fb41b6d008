"""Files that grow: each write is whole or undone, and a restart cuts them to a known length."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from torchcall._command.files import lock, replacing
from torchcall.md.rows import atom_rows
from torchcall.md.simulation import Frame
from torchcall.md.system import System


class AppendFile:
    """A file to which whole pieces are appended, by one process at a time.

    Args:
        path: The file.
        length: In bytes. 0 makes a new file; otherwise the file must exist.

    Raises:
        OSError: It cannot be written.
        ValueError: It is shorter than `length`, or another process appends to it.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        create = 0 if length else os.O_CREAT
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC | create, 0o666)
        self.length = length
        try:
            lock(self._file, path)
            present = os.fstat(self._file).st_size
            if present < length:
                raise ValueError(
                    f"torchcall: {path}: expected at least the {length} bytes that the checkpoint "
                    f"records, got {present}"
                )
        except BaseException:
            os.close(self._file)
            raise

    def cut(self) -> None:
        """Removes what follows `length`."""
        os.ftruncate(self._file, self.length)

    def append(self, data: bytes) -> None:
        """Appends all of it, or nothing and raises OSError (a full disk)."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self.length + written)
        except BaseException:
            self.cut()
            raise
        self.length += len(data)

    def sync(self) -> None:
        """Waits until the data are on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


LOG_COLUMNS = (
    "step", "time_ps", "replica", "potential_ev", "kinetic_ev", "total_ev", "conserved_ev",
    "temperature_k", "pressure_gpa", "volume_a3",
)  # fmt: skip


def log_header() -> bytes:
    """The first line of a log."""
    return (",".join(LOG_COLUMNS) + "\n").encode()


def log_rows(step: int, time_ps: float, frame: Frame, gpa: float) -> bytes:
    """A row for each replica.

    Args:
        step, time_ps: When.
        frame: All replicas.
        gpa: eV/Å³ in a GPa.
    """
    columns = np.stack(
        [
            frame.potential,
            frame.kinetic,
            np.asarray(frame.potential, float) + np.asarray(frame.kinetic, float),
            frame.conserved,
            frame.temperature,
            np.asarray(frame.pressure, float) / gpa,
            frame.volume,
        ],
        axis=1,
    )
    lines = [
        f"{step},{time_ps:.9g},{replica}," + ",".join(f"{value:.9g}" for value in row)
        for replica, row in enumerate(columns.astype(float))
    ]
    return ("\n".join(lines) + "\n").encode()


def extxyz(system: System, frame: Frame, replica: int, **info: Any) -> bytes:
    """One frame of one replica as extended XYZ: positions, momenta, forces and energy.

    These are the bytes of `ase.io.extxyz.write_extxyz`, in a tenth of its time: all numbers are
    formatted at once, and ASE writes the comment line only.
    """
    import ase
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io.extxyz import write_extxyz

    arrays = [np.asarray(x[replica]) for x in (frame.positions, frame.momenta, frame.forces)]
    first = ase.Atoms(
        numbers=system.numbers[:1],
        cell=np.asarray(frame.cell[replica], float),
        pbc=system.pbc,
        info=info,
    )
    first.arrays["momenta"] = arrays[1][:1].astype(float)
    energy = float(frame.potential[replica])
    first.calc = SinglePointCalculator(first, energy=energy, forces=arrays[2][:1].astype(float))
    text = io.StringIO()
    write_extxyz(text, [first], columns=["symbols", "positions", "momenta", "forces"])
    comment = text.getvalue().split("\n")[1]
    rows = atom_rows(system.symbols, np.concatenate(arrays, axis=1))
    return f"{len(system.numbers)}\n{comment}\n".encode() + rows


def raw_frame(step: int, time_ps: float, frame: Frame) -> bytes:
    """One frame of all replicas, for `write_hdf5`."""
    text = io.BytesIO()
    arrays: dict[str, Any] = {
        name: getattr(frame, name)
        for name in ("positions", "momenta", "forces", "cell", "potential")
    }
    np.savez(text, step=step, time_ps=time_ps, **arrays)
    data = text.getvalue()
    return len(data).to_bytes(8, "little") + data


def write_hdf5(raw: Path, path: Path, system: System) -> None:
    """Writes the frames of a file of `raw_frame`s as HDF5, one after the other.

    An HDF5 file that is being written is lost if the process is killed. So frames are appended to
    `raw`, and the HDF5 file is made when the run stops.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    h5py: Any = importlib.import_module("h5py")
    units = {"positions": "Å", "momenta": "u Å √(eV/u)", "forces": "eV/Å", "cell": "Å"}
    units |= {"potential": "eV", "time_ps": "ps", "step": ""}
    places = _places(raw)
    with raw.open("rb") as source, replacing(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                file.create_dataset("atomic_numbers", data=system.numbers)
                file.create_dataset("pbc", data=system.pbc)
                file.attrs["axes"] = json.dumps(["frame", "replica", "atom", "xyz"])
                rows = {}
                for number, (start, length) in enumerate(places):
                    source.seek(start)
                    frame = np.load(io.BytesIO(source.read(length)))
                    for name, unit in units.items():
                        value = frame[name]
                        if number == 0:
                            shape = (len(places), *value.shape)
                            rows[name] = file.create_dataset(name, shape, value.dtype)
                            rows[name].attrs["unit"] = unit
                        rows[name][number] = value
        except RuntimeError as error:  # HDF5's, where the disk is full
            raise OSError(errno.EIO, str(error)) from error


def _places(raw: Path) -> list[tuple[int, int]]:
    """Start and length of each frame."""
    places, at, size = [], 0, raw.stat().st_size
    with raw.open("rb") as file:
        while at < size:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
            places.append((at + 8, length))
            at += 8 + length
    return places
