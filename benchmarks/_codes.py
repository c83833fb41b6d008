"""The codes of `mlip_md.py`: steps of constant energy, each as its users run it.

All start from the same positions and velocities, in single precision, and compute energies, forces
and stresses. A step of several systems is one step of each.
"""

# pyright: reportMissingImports=false
# The networks and torch-sim are optional.

import copy
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ase
import ase.md.verlet
import ase.units
import jax
import numpy as np
import torch

from torchcall.demo._peers import CallCounter, pure_callback_call, with_threads
from torchcall.demo._timing import Run, timed
from torchcall.md.ensembles import Settings, keys
from torchcall.md.simulation import Group, Simulation
from torchcall.md.system import System
from torchcall.mliap import TorchMliap
from torchcall.mliap._input import input_dtypes

STEP = 1.0 * ase.units.fs
SKIN = 1.0  # Å, the default of `torchcall md`


@dataclass(frozen=True)
class Code:
    """A code with its systems, before the first step.

    Attributes:
        run: `run(steps)`.
        energies: Of each system, in eV, at the start.
    """

    run: Run
    energies: np.ndarray


def ase_code(calculator: Any, systems: list[ase.Atoms]) -> Code:
    """ASE's VelocityVerlet under the network's own calculator, one system after the other."""
    integrators = []
    for system in systems:
        atoms = system.copy()
        # The network is shared; the results, which ASE keeps, are not.
        atoms.calc = copy.copy(calculator)
        atoms.calc.reset()
        integrators.append(ase.md.verlet.VelocityVerlet(atoms, timestep=STEP))
    energies = [each.atoms.get_potential_energy() for each in integrators]

    def steps(number: int) -> None:
        for integrator in integrators:
            integrator.run(number)

    return Code(lambda number: timed(lambda: steps(number)), np.asarray(energies))


def torch_sim_code(model: Any, systems: list[ase.Atoms]) -> Code:
    """torch-sim's NVE integrator, all systems in one batch."""
    import torch_sim

    state = torch_sim.io.atoms_to_state(systems, torch.device("cpu"), torch.float32)
    kT, dt = torch.tensor(0.02585), torch.tensor(STEP, dtype=torch.float32)
    init, update = torch_sim.integrators.nve(model, dt=dt, kT=kT, seed=0)
    momenta = np.concatenate([system.get_momenta() for system in systems])
    state = [init(state)]
    state[0].momenta = torch.as_tensor(momenta, dtype=torch.float32)

    def steps(number: int) -> None:
        for _ in range(number):
            state[0] = update(state[0])

    energies = state[0].energy.detach().numpy().copy()
    return Code(lambda number: timed(lambda: steps(number)), energies)


def torchcall_code(
    model: TorchMliap, systems: list[ase.Atoms], every: int, devices: int = 1
) -> Code:
    """The loop of `torchcall md`: jitted records, and the systems of a device in one call."""
    settings = Settings("nve", "nose-hoover", STEP, 0.02585, 0.0, 0.0)
    simulation = Simulation(
        model,
        System.from_ase(systems[0]),
        settings,
        every=every,
        skin=SKIN,
        dtype=np.dtype("float32"),
        kb=ase.units.kB,
    )
    momenta, random = np.stack([s.get_momenta() for s in systems]), keys(0, len(systems))
    groups: list[Group] = []
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        # As the command: jax-md asks for sums in double precision, where they exist.
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        for device, part in enumerate(np.array_split(np.arange(len(systems)), devices)):
            with jax.default_device(jax.devices()[device]):
                groups.append(simulation.start(momenta[part], random[part]))
        energies = np.concatenate([simulation.frame(group).potential for group in groups])

    pool = ThreadPoolExecutor(devices)

    def records(number: int) -> None:
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.filterwarnings("ignore", "Explicitly requested dtype")
            for _ in range(number // every):
                groups[:] = pool.map(simulation.advance, groups)
            jax.block_until_ready([group.state for group in groups])

    return Code(lambda number: timed(lambda: records(number)), energies)


def callback_code(model: TorchMliap, systems: list[ase.Atoms], every: int, threads: int) -> Code:
    """The same loop, with the eager network called by `jax.pure_callback`."""
    call = pure_callback_call(
        with_threads(model.wrapper._inspected(), threads),
        model.output_specs,
        (input_dtypes(),),
        requires_grad=True,
        counter=CallCounter(),
    )
    wrapper: Any = call
    return torchcall_code(replace(model, wrapper=wrapper, narrow=False), systems, every)


def torch_sim_model(network: str, source: Any) -> Any:
    """The network in torch-sim's own adapter.

    Raises:
        ImportError: torch-sim is not installed.
    """
    # `torch_sim` imports all its adapters, and warns of networks that are not installed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if network == "mace":
            from torch_sim.models.mace import MaceModel

            loaded = torch.load(source, weights_only=False)
            return MaceModel(loaded, device=torch.device("cpu"), dtype=torch.float32)
        import sevenn.calculator
        from sevenn.util import load_checkpoint

        # torch-sim 0.3.0, the last for Python 3.11, imports a name that sevenn 0.13 has no more.
        sevenn.calculator.torch_script_type = torch.jit.ScriptModule
        from torch_sim.models.sevennet import SevenNetModel

        return SevenNetModel(load_checkpoint(source).build_model(), device="cpu")


def check_energies(codes: dict[str, Code]) -> None:
    """Checks that all codes start at the same energies, to 1e-5 of them.

    Raises:
        RuntimeError: They do not.
    """
    (first, expected), *others = codes.items()
    for name, code in others:
        if not np.allclose(code.energies, expected.energies, rtol=1e-5):
            sys.stdout.flush()
            raise RuntimeError(
                f"torchcall: {name}: expected the energies of {first}, "
                f"{expected.energies.tolist()} eV, got {code.energies.tolist()} eV"
            )


Maker = Callable[[list[ase.Atoms], int], Code]
"""From systems, and steps in a record, to a code."""
