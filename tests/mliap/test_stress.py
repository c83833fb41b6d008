"""Stress and pressure against ASE's calculators, volume derivatives and the two conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from beartype import beartype
from jaxtyping import jaxtyped
from reference import one_thread  # noqa: F401

from torchcall import mliap


def compiled(function):
    """The function with its jaxtyping annotations enforced while it is traced."""
    return jax.jit(jaxtyped(typechecker=beartype)(function), static_argnames="convention")


stress_jax = compiled(mliap.stress_from_virial_jax)
pressure_jax = compiled(mliap.pressure_from_stress_jax)


def ase_energies(atoms, calculator):
    """Energies of deformed copies, `(K, 3, 3)` strains to `(K,)`."""

    def energies(strains):
        values = []
        for strain in strains:
            copy = atoms.copy()
            deform = np.eye(3) + strain
            copy.set_cell(atoms.cell.array @ deform)
            copy.set_positions(atoms.positions @ deform)
            copy.calc = calculator
            values.append(copy.get_potential_energy())
        return np.array(values)

    return energies


def crystal(symbol, spacing, seed):
    generator = np.random.default_rng(seed)
    cell = spacing * np.array([[2.0, 0.2, -0.1], [0.3, 1.9, 0.2], [-0.2, 0.1, 2.1]])
    frac = np.stack(np.meshgrid(*[[0, 0.5]] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = (frac + generator.integers(-1, 2, frac.shape)) @ cell
    positions += generator.normal(scale=0.1, size=frac.shape)
    return Atoms([symbol] * len(frac), positions, cell=cell, pbc=True)


@pytest.mark.parametrize(
    "atoms, calculator, tolerance",
    [
        # The energy of ASE's EMT jumps slightly at its cutoff.
        (crystal("Cu", 2.4, 0), EMT(), 1e-6),
        (crystal("Ar", 3.4, 1), LennardJones(epsilon=0.2, sigma=3.0, rc=6.0, smooth=True), 1e-8),
    ],
    ids=["effective-medium copper", "Lennard-Jones argon"],
)
def test_stress_equals_that_of_ase_calculators(atoms, calculator, tolerance):
    virial = reference.fourth_order(ase_energies(atoms, calculator), (3, 3))
    copy = atoms.copy()
    copy.calc = calculator
    expected = copy.get_stress(voigt=False)
    tensors = torch.tensor(virial)[None], torch.tensor(atoms.cell.array)[None]
    found = mliap.stress_from_virial(*tensors, convention="ase")[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * abs(expected).max())
    assert torch.equal(mliap.stress_from_virial(*tensors), torch.tensor(found)[None])
    assert torch.equal(
        mliap.stress_from_virial(*tensors, convention="kups"), -torch.tensor(found)[None]
    )


def test_stress_from_cell_gradients_equals_the_strain_derivative():
    """The steps of an ASE calculator: ∂E/∂h → virial → stress."""
    module = reference.potentials()["Stillinger-Weber"]
    members = [reference.systems()[kind] for kind in ("triclinic", "left-handed")]
    inputs = reference.graph(members)
    out = module(inputs)
    virial = mliap.virial_from_lattice_gradient(
        -out["position_gradients"],
        inputs["pos"],
        inputs["batch"],
        inputs["cell"],
        out["cell_gradients"],
    )
    stress = mliap.stress_from_virial(virial, inputs["cell"])
    for k, member in enumerate(members):
        volume = abs(np.linalg.det(member.cell))
        expected = reference.strain_derivative(module, member) / volume
        np.testing.assert_allclose(stress[k], expected, rtol=0, atol=1e-8 * abs(expected).max())
    assert not stress[-1].any()


@pytest.mark.parametrize("name", ["Lennard-Jones", "Stillinger-Weber", "message passing"])
def test_pressure_is_minus_the_volume_derivative_of_the_energy(name):
    module, member = reference.potentials()[name], reference.systems()["triclinic"]
    volume = np.linalg.det(member.cell)

    def resized(changes):
        scale = np.cbrt(1.0 + changes[:, 0] / volume)[:, None, None]
        return reference.energies(module, member, member.positions * scale, member.cell * scale)

    expected = -reference.fourth_order(resized, (1,), step=0.05)[0]
    virial = torch.tensor(reference.strain_derivative(module, member))[None]
    cell = torch.tensor(member.cell)[None]
    for convention in ("ase", "kups"):
        stress = mliap.stress_from_virial(virial, cell, convention=convention)
        found = mliap.pressure_from_stress(stress, convention=convention)
        assert found.shape == (1,)
        np.testing.assert_allclose(found[0], expected, rtol=1e-7)


def test_squeezed_silicon_has_positive_pressure_and_negative_ase_stress():
    module = reference.potentials()["Stillinger-Weber"]
    member = reference.systems()["triclinic"]
    squeezed = member.moved(0.9 * member.positions, 0.9 * member.cell)
    virial = torch.tensor(reference.strain_derivative(module, squeezed))[None]
    stress = mliap.stress_from_virial(virial, torch.tensor(squeezed.cell)[None])
    assert (stress[0].diagonal() < 0).all()
    assert mliap.pressure_from_stress(stress, convention="ase")[0] > 0


def test_gigapascal_conversion_equals_that_of_ase():
    assert abs(units.GPa * 160.21766208 - 1.0) < 1e-7


def cells():
    full = reference.systems()["triclinic"].cell
    flat = full.copy()
    flat[2] = flat[0] + flat[1]
    slab = full.copy()
    slab[1] = 0.0
    wire = np.diag([3.0, 0.0, 0.0])
    return np.stack([full, flat, slab, wire, np.zeros((3, 3)), full[[1, 0, 2]]])


def test_systems_without_a_volume_have_no_stress():
    virial = torch.eye(3, dtype=torch.float64).repeat(6, 1, 1)
    virial[3] = 0.0
    cell = torch.tensor(cells())
    stress = mliap.stress_from_virial(virial, cell)
    pressure = mliap.pressure_from_stress(stress, convention="ase")
    for k, has_volume in enumerate([True, False, False, False, False, True]):
        assert stress[k].isfinite().all() == has_volume
        assert stress[k].isnan().all() != has_volume
        assert pressure[k].isfinite() == has_volume
    # A left-handed cell has the same stress.
    torch.testing.assert_close(stress[5], stress[0], rtol=1e-14, atol=0)


def test_open_axes_have_a_length_of_one_angstrom_whatever_their_vectors_are():
    full = reference.systems()["triclinic"].cell
    flat, wire = full.copy(), full.copy()
    flat[2] = flat[0] + flat[1]
    wire[[0, 2]] = [[0, 0, 0], 2 * full[1]]
    cell = torch.tensor(np.stack([full, flat, full, wire, full, flat]))
    pbc = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]) == 1
    sizes = [
        abs(np.linalg.det(full)),
        np.linalg.norm(np.cross(full[0], full[1])),
        np.linalg.norm(np.cross(full[0], full[2])),
        np.linalg.norm(full[1]),
        np.nan,  # no periodic axis
        np.nan,  # flat although all axes are periodic
    ]
    virial = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = virial.numpy() / np.array(sizes)[:, None, None]
    stress = mliap.stress_from_virial(virial, cell, pbc=pbc)
    np.testing.assert_allclose(stress, expected, rtol=1e-13)
    pressure = mliap.pressure_from_stress(torch.ones_like(stress), pbc, convention="ase")
    np.testing.assert_array_equal(pressure, [-1, -1, -1, -1, np.nan, -1])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(v.numpy()) for v in (virial, cell, pbc)]
        found = stress_jax(*arrays[:2], convention="ase", pbc=arrays[2])
        np.testing.assert_allclose(found, expected, rtol=1e-13)
        found = pressure_jax(jnp.ones((6, 3, 3)), arrays[2], convention="ase")
        np.testing.assert_array_equal(found, pressure)


@pytest.mark.parametrize("convention", ["ase", "kups"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jax_twins_agree_with_torch(convention, dtype):
    virial = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    cell = torch.tensor(cells()).to(dtype)
    stress = mliap.stress_from_virial(virial, cell, convention=convention)
    pressure = mliap.pressure_from_stress(stress, convention=convention)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    with jax.enable_x64(dtype == torch.float64):
        arrays = jnp.asarray(virial.numpy()), jnp.asarray(cell.numpy())
        found = stress_jax(*arrays, convention=convention)
        assert found.dtype == stress.numpy().dtype
        np.testing.assert_allclose(found, stress, rtol=tolerance)
        found = pressure_jax(found, convention=convention)
        np.testing.assert_allclose(found, pressure, rtol=10 * tolerance)


def test_mixed_precisions_are_promoted_to_the_highest():
    virial, cell = torch.ones(1, 3, 3), torch.tensor(cells()[:1])
    assert mliap.stress_from_virial(virial, cell).dtype == torch.float64
    assert mliap.stress_from_virial(virial.double(), cell.float()).dtype == torch.float64
    assert mliap.stress_from_virial(virial, cell.float()).dtype == torch.float32


def test_unknown_conventions_and_wrong_shapes_are_named_in_the_error():
    virial, cell = torch.ones(2, 3, 3), torch.eye(3).repeat(2, 1, 1)
    arrays = jnp.asarray(virial.numpy()), jnp.asarray(cell.numpy())
    for to_stress, to_pressure, (v, h) in (
        (mliap.stress_from_virial, mliap.pressure_from_stress, (virial, cell)),
        (mliap.stress_from_virial_jax, mliap.pressure_from_stress_jax, arrays),
    ):
        for call in (
            lambda f=to_stress, v=v, h=h: f(v, h, convention="lammps"),
            lambda f=to_pressure, v=v: f(v, convention="lammps"),
        ):
            with pytest.raises(
                ValueError, match=r'convention: expected "ase" or "kups", got .lamm'
            ):
                call()
        for wrong, text in (
            ((v[0], h), r"torchcall: virial: expected \(B, 3, 3\), got \(3, 3\)"),
            ((v, h[0]), r"torchcall: cell: expected \(B, 3, 3\), got \(3, 3\)"),
            ((v[:1], h), r"virial: expected \(2, 3, 3\) as the cell, got \(1, 3, 3\)"),
        ):
            with pytest.raises(ValueError, match=text):
                to_stress(*wrong)
