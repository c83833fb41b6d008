"""`torchcall.integrations.ase` against ASE's own Lennard-Jones calculator."""

import jax
import numpy as np
import pair_potential
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators import lj
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from ase.mep import NEB
from ase.optimize import BFGS
from ase.phonons import Phonons
from pair_potential import CUTOFF, EPSILON, ONSET, SIGMA

from torchcall.integrations.ase import Calculator
from torchcall.mliap import TorchMliap


def reference():
    return lj.LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=CUTOFF, ro=ONSET, smooth=True)


@pytest.fixture(scope="module")
def model():
    return pair_potential.potential()


@pytest.fixture
def compiled():
    """Counts the compilations since it was called."""
    times = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            times.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(times)
    jax.monitoring.unregister_event_duration_listener(listen)


def crystal(shear=0.5):
    atoms = bulk("Ar", "fcc", a=5.5, cubic=True)
    strain = np.array([[0, 0, 0], [shear, 0, 0], [0.2, -shear, 0]])
    atoms.set_cell(atoms.cell.array + strain, scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def slab():
    atoms = fcc111("Ar", (2, 2, 2), a=5.4, vacuum=8.0)
    atoms.rattle(0.1, seed=2)
    return atoms


def wire():
    return Atoms("Ar2", [[0, 0, 0], [0.1, 3.9, 0.2]], cell=[4.2, 0, 0], pbc=[True, False, False])


def molecule():
    return Atoms("Ar3", [[0, 0, 0], [3.9, 0.1, 0], [1.8, 3.5, 0.3]])


def both(model, atoms, **options):
    """The atoms with our calculator and with ASE's."""
    ours, theirs = atoms.copy(), atoms.copy()
    ours.calc, theirs.calc = Calculator(model, **options), reference()
    return ours, theirs


def assert_same(ours, theirs, tolerance=1e-12):
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), tolerance)
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), rtol=0, atol=tolerance)
    if ours.cell.rank == 3:
        np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [crystal, slab, wire, molecule])
def test_energy_forces_and_stress_equal_ases(model, make):
    ours, theirs = both(model, make())
    assert_same(ours, theirs)
    assert np.abs(theirs.get_forces()).max() > 1e-3
    assert ours.get_potential_energy(force_consistent=True) == ours.get_potential_energy()
    assert ours.get_forces().dtype == np.float64
    if ours.cell.rank < 3:
        with pytest.raises(PropertyNotImplementedError, match=r"torchcall: .*stress: .*a cell of"):
            ours.get_stress()


def test_the_stress_is_the_derivative_of_the_energy(model):
    atoms = crystal()
    atoms.positions[0] += atoms.cell[1] - 2 * atoms.cell[2]  # in another image
    atoms.calc = Calculator(model)
    expected = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), expected, rtol=0, atol=1e-10)


def test_single_precision(model):
    ours, theirs = both(model, crystal(), dtype="float32")
    assert_same(ours, theirs, 1e-6)


def test_a_relaxation_compiles_once_and_ends_where_ases_does(model, compiled):
    ours, theirs = both(model, crystal(0.1))
    ours.get_potential_energy()
    before, calls = compiled(), model.wrapper.stats()["calls"]
    for atoms in (ours, theirs):
        assert BFGS(atoms, logfile=None).run(fmax=1e-3, steps=30)
    np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-9)
    steps = model.wrapper.stats()["calls"] - calls
    assert steps > 3
    # Other elements, far atoms and another cell fit the compiled model, too.
    ours.numbers[:] = 10
    ours.positions[1] += 5 * ours.cell[0] - 3 * ours.cell[2]
    assert_same(ours, Atoms(ours, calculator=reference()))
    ours.set_cell(1.01 * ours.cell, scale_atoms=True)
    assert_same(ours, Atoms(ours, calculator=reference()))
    assert compiled() == before
    assert model.wrapper.stats()["calls"] == calls + steps + 2


def test_structures_of_other_sizes_and_periodicity(model):
    calculator = Calculator(model, capacity_multiplier=1.0)
    for atoms in (molecule(), crystal(), slab(), crystal() * (2, 1, 1), molecule()):
        theirs = Atoms(atoms, calculator=reference())
        atoms.calc = calculator
        assert_same(atoms, theirs)
    atoms = crystal()
    atoms.calc = calculator
    for change in (lambda: atoms.set_pbc([True, False, True]), lambda: atoms.set_cell(None)):
        change()
        if not atoms.cell.rank:
            atoms.pbc = False
        assert_same(atoms, Atoms(atoms, calculator=reference()))
    # More neighbours than the capacity.
    dense = crystal()
    dense.calc = Calculator(model, capacity_multiplier=1.0)
    dense.get_potential_energy()
    dense.set_cell(0.9 * dense.cell, scale_atoms=True)
    assert_same(dense, Atoms(dense, calculator=reference()), 1e-11)


def test_phonon_frequencies_equal_ases(model, tmp_path):
    atoms = bulk("Ar", "fcc", a=5.3)
    energies = []
    for k, calculator in enumerate((Calculator(model), reference())):
        phonons = Phonons(atoms, calculator, supercell=(3, 3, 3), name=tmp_path / str(k))
        phonons.run()
        phonons.read(acoustic=True)
        energies.append(phonons.band_structure([[0.5, 0.5, 0.0]])[0])
    assert energies[0].min() > 1e-3  # eV
    np.testing.assert_allclose(energies[0], energies[1], rtol=1e-9)


def test_one_calculator_serves_the_images_of_a_path(model):
    barriers = []
    for calculator in (Calculator(model), reference()):
        start = Atoms("Ar4", [[0, 0, 0], [4, 0, 0], [2, 3.4, 0], [2, 1.15, 3.2]])
        end = start.copy()
        end.positions[3, 2] *= -1
        images = [start, *(start.copy() for _ in range(3)), end]
        for image in images:
            image.calc = calculator
        path = NEB(images, allow_shared_calculator=True, method="improvedtangent")
        path.interpolate()
        path.images[2].positions[:3] *= 1.2
        BFGS(path, logfile=None).run(fmax=0.05, steps=4)
        barriers.append([image.get_potential_energy() for image in images])
    np.testing.assert_allclose(barriers[0], barriers[1], rtol=0, atol=1e-9)


class Charged(torch.nn.Module):
    """`charge + 10 spin + 0 Σ r²`."""

    cutoff = 3.0

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        nothing = 0 * input["pos"].square().sum()
        return input["charge"] + 10 * input["spin"] + nothing


def test_charge_and_spin_are_those_of_the_atoms():
    atoms = molecule()
    atoms.calc = Calculator(TorchMliap.from_energy(Charged().eval()))
    assert atoms.get_potential_energy() == 10.0
    atoms.info["charge"] = -1
    assert atoms.get_potential_energy() == 9.0
    atoms.info["spin"] = 3
    assert atoms.get_potential_energy() == 29.0
    atoms.info.clear()
    atoms.set_initial_charges([1.0, 0.5, 0.0])
    assert atoms.get_potential_energy() == 11.5


def test_the_documented_example_runs(model):
    names = {"model": model}
    exec(pair_potential.documented("Calculator"), names)
    assert names["atoms"].get_potential_energy() < -0.1
    assert np.isfinite(names["stress"]).all()


def test_what_a_model_does_not_return_is_an_error(model):
    atoms = crystal()
    atoms.calc = Calculator(pair_potential.without_cell_gradients())
    expected = both(model, atoms)[1].get_forces()
    np.testing.assert_allclose(atoms.get_forces(), expected, rtol=0, atol=1e-12)
    with pytest.raises(PropertyNotImplementedError, match="a model that computes cell gradients"):
        atoms.get_stress()
    with pytest.raises(PropertyNotImplementedError, match="energies: expected one of energy, "):
        atoms.get_potential_energies()


def test_wrong_arguments_get_clear_errors(model):
    with pytest.raises(TypeError, match=r"torchcall: Calculator: model: .* got a str"):
        Calculator("7net-0")
    with pytest.raises(ValueError, match=r"torchcall: Calculator: dtype: .* got 'float16'"):
        Calculator(model, dtype="float16")
    with pytest.raises(ValueError, match="torchcall: neighbor_list: skin: "):
        Calculator(model, skin=-1.0)
    atoms = molecule()
    atoms.calc = Calculator(model)
    atoms.positions[0, 0] = np.nan
    with pytest.raises(ValueError, match="torchcall: Calculator: positions: expected finite"):
        atoms.get_potential_energy()
