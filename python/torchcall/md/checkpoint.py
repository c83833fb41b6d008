"""Checkpoints: all that a run needs to continue bit for bit, in one file that is always whole."""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from torchcall._command.files import write_whole
from torchcall._command.parsing import CommandError
from torchcall.md.simulation import Group, Simulation
from torchcall.md.weights import is_other, weights_record
from torchcall.mliap import NeighborList
from torchcall.mliap._neighbors.in_jax.bins import BinLayout
from torchcall.mliap._neighbors.layout import Layout
from torchcall.mliap._neighbors.neighbor_list import empty

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run at one step.

    Attributes:
        step: Steps done.
        options: Those that determine the trajectory, and the names of its files.
        lengths: Of the log and the trajectories, in bytes, by name.
        groups: For each device, the leaves of the state, and the list's settings.
        weights: `weights_record` of the model; None in checkpoints of earlier versions.
    """

    step: int
    options: dict[str, Any]
    lengths: dict[str, int]
    groups: list[tuple[list[np.ndarray], dict[str, Any]]]
    weights: dict[str, str] | None

    def write(self, path: Path) -> None:
        """Replaces the file.

        Raises:
            OSError: It cannot be written; the old checkpoint is as it was.
        """
        arrays: dict[str, Any] = {}
        lists = []
        for number, (leaves, layout) in enumerate(self.groups):
            layout = dict(layout)
            for name in ("basis", "limits"):
                if layout[name] is not None:
                    arrays[f"{number}/{name}"] = layout[name]
                del layout[name]
            arrays |= {f"{number}/{k}": leaf for k, leaf in enumerate(leaves)}
            lists.append({"leaves": len(leaves), **layout})
        text = json.dumps(
            {
                "format": _FORMAT,
                "step": self.step,
                "options": self.options,
                "lengths": self.lengths,
                "groups": lists,
                "weights": self.weights,
            }
        )
        file = io.BytesIO()
        np.savez(file, text=np.frombuffer(text.encode(), np.uint8), **arrays)
        write_whole(path, file.getvalue())

    def continued(
        self, simulation: Simulation, initial: list[Group], options: argparse.Namespace
    ) -> list[Group]:
        """The groups, after a check of structure and model.

        Args:
            simulation: Of these options.
            initial: Its groups before the first step.
            options: The run's.

        Raises:
            CommandError: Structure or model are others than the run's.
            ValueError: The state has other arrays.
        """
        if is_other(weights_record(simulation.model.wrapper), self.weights):
            raise CommandError(
                "--model: expected the model of the run to continue, got one with other weights"
            )
        groups = [
            unpacked(new, leaves, layout, options.checkpoint)
            for new, (leaves, layout) in zip(initial, self.groups, strict=True)
        ]
        for group, new in zip(groups, initial, strict=True):
            constants = [(g.state.atoms, g.state.md.mass) for g in (group, new)]
            if not jax.tree.all(jax.tree.map(np.array_equal, *constants)):
                raise CommandError(
                    f"--structure {options.structure}: expected the structure of the run to "
                    "continue, got other elements, masses or charges"
                )
            now = simulation.energies(Group(group.state, _searched(simulation, group)))
            before = np.asarray(group.state.last.energy)
            if not np.allclose(now, before, rtol=1e-5, atol=1e-3):
                raise CommandError(
                    f"--model: expected the model of the run to continue, with energy "
                    f"{before[0]:.6f} eV at the checkpoint, got one with {now[0]:.6f} eV"
                )
        return groups


def _searched(simulation: Simulation, group: Group) -> NeighborList:
    """A list for the group's positions, which may be larger than its own."""
    frame, neighbors = simulation.frame(group), group.neighbors
    (device,) = neighbors.positions.devices()
    with jax.default_device(device):
        return simulation.search.allocate(
            frame.positions.reshape(-1, 3),
            frame.cell,
            np.asarray(neighbors.pbc),
            np.asarray(neighbors.batch),
        )


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        ValueError: It is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = json.loads(bytes(file["text"]).decode())
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']}")
            groups = []
            for number, layout in enumerate(found["groups"]):
                leaves = [file[f"{number}/{k}"] for k in range(layout.pop("leaves"))]
                for name in ("basis", "limits"):
                    layout[name] = file.get(f"{number}/{name}")
                groups.append((leaves, layout))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"torchcall: {path}: expected a checkpoint of torchcall md, got another file: "
            f"{type(error).__name__}: {error}"
        ) from error
    weights = found.get("weights")
    return Checkpoint(found["step"], found["options"], found["lengths"], groups, weights)


def packed(group: Group) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The state's leaves, and what else determines the list at its positions: sizes and basis."""
    neighbors = group.neighbors
    settings = {
        "layout": asdict(neighbors.layout),
        "basis": np.asarray(neighbors.basis),
        "limits": None if neighbors.limits is None else np.asarray(neighbors.limits),
    }
    return [np.asarray(leaf) for leaf in jax.tree.leaves(group.state)], settings


def unpacked(like: Group, leaves: list[np.ndarray], settings: dict[str, Any], path: Path) -> Group:
    """The group of a checkpoint.

    Args:
        like: A group of the same options, with the same device.
        leaves, settings: From `packed`.
        path: Of the checkpoint, for errors.

    Raises:
        ValueError: The state has other arrays.
    """
    old, tree = jax.tree.flatten(like.state)
    expected = [(leaf.shape, np.dtype(leaf.dtype)) for leaf in old]
    if expected != [(leaf.shape, leaf.dtype) for leaf in leaves]:
        raise ValueError(
            f"torchcall: {path}: expected the arrays of this structure and ensemble, got others"
        )
    (device,) = like.neighbors.positions.devices()
    state = tree.unflatten(jax.device_put(leaves, device))
    return Group(state, _list_of(like.neighbors, settings, device))


def _list_of(like: NeighborList, settings: dict[str, Any], device: Any) -> NeighborList:
    layout = dict(settings["layout"])
    bins = layout.pop("bins")
    if bins is not None:
        numbers: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in bins.items()}
        bins = BinLayout(**numbers)
    sizes = replace(like.layout, **layout, bins=bins)
    assert isinstance(sizes, Layout)
    limits = settings["limits"]
    with jax.default_device(device):
        return empty(
            sizes,
            like.positions,
            like.cell,
            like.pbc,
            like.batch,
            jnp.asarray(settings["basis"]),
            None if limits is None else jnp.asarray(limits),
        )
