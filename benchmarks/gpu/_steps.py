"""Steps of molecular dynamics in one jitted program without synchronisation."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from _common import Loop, graph_at, neighbors_of
from _models import Engines

from torchcall.mliap import SystemId, Table, TorchMliap, energy_and_gradients

FEMTOSECOND = 0.09822694788  # Å √(u/eV)
MASS = 39.948  # u, argon
SKIN, EVERY = 1.0, 10  # Å; steps between two searches


def step_loop(model: Any, engines: Engines, n_atoms: int, length: int, *, dt: float = 0.1) -> Loop:
    """`length` steps of velocity Verlet as one jitted function, and its arguments.

    Args:
        model: A `TorchMliap`, or any function of an `AtomGraphInput`.
        engines: The potential; its cutoff is used.
        n_atoms: A power of two.
        length: A multiple of ten.
        dt: In fs; small, for the network's weights are random.

    Returns:
        The function returns whether the list overflowed, and the last energy.
    """
    if not isinstance(model, TorchMliap):
        cutoff = Table((SystemId(0),), jnp.asarray([engines.cutoff], float))
        model = TorchMliap(cutoff, model)
    neighbors = neighbors_of(n_atoms, engines.cutoff, skin=SKIN, slack=1.05)
    step_size = dt * FEMTOSECOND

    def step(cell: Any, carry: Any, _: Any) -> tuple[Any, Any]:
        positions, velocities, gradients, nbrs = carry
        velocities = velocities - (0.5 * step_size / MASS) * gradients
        positions = positions + step_size * velocities
        nbrs = nbrs.update(positions, cell)
        out = energy_and_gradients(model, graph_at(positions, cell, nbrs))
        gradients = out.position_gradients
        velocities = velocities - (0.5 * step_size / MASS) * gradients
        return (positions, velocities, gradients, nbrs), out.energy[0]

    def run(positions: Any, velocities: Any, cell: Any, nbrs: Any) -> tuple[Any, Any]:
        def block(carry: Any, _: Any) -> tuple[Any, Any]:
            positions, velocities, gradients, nbrs = carry
            carry = positions, velocities, gradients, nbrs.rebuild(positions, cell)
            return jax.lax.scan(lambda c, x: step(cell, c, x), carry, None, length=EVERY)

        start = (positions, velocities, jnp.zeros_like(positions), replace(nbrs, schedule="never"))
        end, energies = jax.lax.scan(block, start, None, length=length // EVERY)
        return end[3].did_overflow, energies[-1, -1]

    velocities = 0.01 * jax.random.normal(jax.random.key(0), neighbors.positions.shape)
    return jax.jit(run), (neighbors.positions, velocities, neighbors.cell, neighbors)
