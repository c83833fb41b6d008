"""Lattice gradients from virials: finite differences, degenerate cells, precisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import as_jax, one_thread, random_batch  # noqa: F401

from torchcall import mliap

NAMES = ["Lennard-Jones", "Stillinger-Weber", "message passing"]
KINDS = list(reference.systems())
FULL = ["triclinic", "left-handed", "slab with a vacuum vector"]

to_gradient = mliap.lattice_gradient_from_virial
to_virial = mliap.virial_from_lattice_gradient


to_gradient_jax = jax.jit(mliap.lattice_gradient_from_virial_jax)


@functools.cache
def solved(name):
    """All kinds of systems in one batch, phantoms included: inputs, outputs and virials."""
    module, members = reference.potentials()[name], list(reference.systems().values())
    inputs = reference.graph(members)
    virial = torch.zeros(len(members) + 1, 3, 3, dtype=torch.float64)
    for k, member in enumerate(members):
        full = torch.tensor(reference.strain_derivative(module, member))
        virial[k] = 0.5 * (full + full.T)
    return module, inputs, module(inputs), virial


def recovered(name):
    module, inputs, out, virial = solved(name)
    gradient = to_gradient(
        -out["position_gradients"], inputs["pos"], inputs["batch"], inputs["cell"], virial
    )
    return module, inputs, out, virial, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_lattice_gradient_equals_differences_at_fixed_cartesian_positions(name, kind):
    module, _, _, _, gradient = recovered(name)
    found, member = gradient[KINDS.index(kind)].numpy(), reference.systems()[kind]
    expected = reference.cell_derivative(module, member, fixed="cartesian")
    # Constant energies differ by rounding, 1e-11 eV/Å once divided by the step.
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * scale)
    assert not found[~member.cell.any(1)].any()


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("name", NAMES)
def test_lattice_gradient_equals_differences_at_fixed_fractional_positions(name, kind):
    module, inputs, out, virial, gradient = recovered(name)
    k, member = KINDS.index(kind), reference.systems()[kind]
    expected = reference.cell_derivative(module, member, fixed="fractional")
    # r = s h, so dE/dh = ∂E/∂h + Σ s ⊗ ∂E/∂r, which is h⁻ᵀ virial.
    g = out["position_gradients"][inputs["batch"] == k].numpy()
    frac = member.positions @ np.linalg.inv(member.cell)
    scale = 1e-8 * np.abs(expected).max()
    np.testing.assert_allclose(gradient[k].numpy() + frac.T @ g, expected, rtol=0, atol=scale)
    by_virial = np.linalg.solve(member.cell.T, virial[k].numpy())
    np.testing.assert_allclose(by_virial, expected, rtol=0, atol=scale)


@pytest.mark.parametrize("name", NAMES)
def test_lattice_gradient_equals_autograd(name):
    _, _, out, _, gradient = recovered(name)
    expected = out["cell_gradients"].numpy()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_lattice_gradient_of_phantom_systems_is_exactly_zero(name):
    *_, gradient = recovered(name)
    assert not gradient[-1].any()


def test_symmetrising_only_the_cell_part_gives_a_wrong_gradient():
    _, inputs, out, virial, gradient = recovered("Stillinger-Weber")
    n = len(virial)
    moment = torch.zeros(n, 3, 3, dtype=torch.float64).index_add(
        0, inputs["batch"], inputs["pos"][:, :, None] * out["position_gradients"][:, None]
    )
    shortcut = virial[0] - 0.5 * (moment[0] + moment[0].T)
    wrong = torch.linalg.solve(inputs["cell"][0].T, shortcut)
    error = (wrong - out["cell_gradients"][0]).abs().max() / out["cell_gradients"][0].abs().max()
    assert error > 0.1
    # The derivative by all nine strains is symmetric.
    full = moment[0] + inputs["cell"][0].T @ gradient[0]
    torch.testing.assert_close(full, full.T, rtol=1e-9, atol=1e-9)


def test_an_atom_in_another_image_changes_the_gradient_and_not_the_virial():
    module, member = solved("Stillinger-Weber")[0], reference.systems()["triclinic"]
    images = np.random.default_rng(0).integers(-2, 3, member.positions.shape)
    moved = member.moved(member.positions + images @ member.cell, member.cell)
    gradients, virials, n = [], [], len(images)
    for inputs in (reference.graph([member]), reference.graph([moved])):
        out = module(inputs)
        where = (-out["position_gradients"], inputs["pos"], inputs["batch"], inputs["cell"])
        virials.append(to_virial(*where, out["cell_gradients"])[0])
        gradients.append(to_gradient(*where, to_virial(*where, out["cell_gradients"]))[0])
        g = out["position_gradients"][:n].numpy()
    torch.testing.assert_close(virials[1], virials[0], rtol=0, atol=1e-11)
    expected = gradients[0].numpy() - images.T @ g
    np.testing.assert_allclose(gradients[1], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_virial_and_lattice_gradient_convert_into_each_other(name):
    _, inputs, out, virial, gradient = recovered(name)
    forces, where = -out["position_gradients"], (inputs["pos"], inputs["batch"], inputs["cell"])
    scale = virial.abs().max().item()
    again = to_virial(forces, *where, gradient)
    torch.testing.assert_close(again, virial, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(to_gradient(forces, *where, again), gradient, rtol=0, atol=1e-9)
    assert torch.equal(again, again.transpose(1, 2))


def open_rows():
    """Systems whose open axes have vectors that depend on the others: name, system, cell."""
    slab, other = reference.systems()["slab"], reference.systems()["slab with a vacuum vector"]
    wire, molecule = reference.systems()["wire"], reference.systems()["molecule"]
    a, b, c = np.eye(3)
    return {
        "slab, third vector in the plane": (slab, slab.cell + np.outer(c, slab.cell[:2].sum(0))),
        "slab, second vector along the first": (
            other,
            np.where(b[:, None] == 1, 2.0 * other.cell[0], other.cell),
        ),
        "wire, all vectors parallel": (wire, wire.cell + np.outer(a - 3 * c, wire.cell[1])),
        "molecule, two vectors parallel": (molecule, np.array([[1, 0, 0], [2, 0, 0], [0, 0, 1.0]])),
        "molecule, vectors that are not numbers": (molecule, np.full((3, 3), np.nan)),
        "triclinic": (reference.systems()["triclinic"], reference.systems()["triclinic"].cell),
    }


@functools.cache
def with_open_rows(name):
    """These systems in one batch: module, inputs, forces, virials, expected cell gradients."""
    module, members = reference.potentials()[name], open_rows().values()
    inputs = reference.graph([member for member, _ in members], phantom=False)
    out = module(inputs)
    virials, expected = [], []
    for member, cell in members:
        full = reference.strain_derivative(module, member)
        virials.append(0.5 * (full + full.T))

        def moved(moves, member=member, cell=cell):
            positions = np.broadcast_to(member.positions, (len(moves), *member.positions.shape))
            return reference.energies(module, member, positions, np.nan_to_num(cell) + moves)

        expected.append(reference.fourth_order(moved, (3, 3)))
    inputs["cell"] = torch.tensor(np.stack([cell for _, cell in members]))
    virial = torch.tensor(np.stack(virials))
    return inputs, -out["position_gradients"], virial, np.stack(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["Lennard-Jones", "Stillinger-Weber"])
def test_open_axes_have_zero_gradient_whatever_their_vectors_are(name, dtype):
    inputs, forces, virial, expected = with_open_rows(name)
    values = (forces, inputs["pos"], inputs["batch"], inputs["cell"], virial)
    values = [v.to(dtype) if v.is_floating_point() else v for v in values]
    scale = np.abs(expected).max()
    tolerance = scale * (1e-8 if dtype == torch.float64 else 1e-5)
    pbc = inputs["pbc"]
    found = to_gradient(*values, pbc)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert not found[~pbc].any()
    again = to_virial(*values[:4], torch.where(pbc[..., None], found, torch.nan), pbc)
    # A molecule's virial needs no cell.
    np.testing.assert_allclose(again, virial, rtol=0, atol=20 * tolerance)
    with jax.enable_x64(dtype == torch.float64):
        twin = to_gradient_jax(*as_jax(*values, pbc))
        np.testing.assert_allclose(twin, found, rtol=0, atol=tolerance)
        assert not np.asarray(twin)[~pbc.numpy()].any()
    # Without `pbc`, most of these cells have no gradient.
    assert to_gradient(*values)[:3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_open_axes_are_handled_in_low_precisions(dtype):
    inputs, forces, virial, _ = with_open_rows("Stillinger-Weber")
    values = (forces, inputs["pos"], inputs["batch"], inputs["cell"], virial)
    values = [v.to(dtype) if v.is_floating_point() else v for v in values]
    exact = [v.double() if v.is_floating_point() else v for v in values]
    found, expected = (to_gradient(*v, inputs["pbc"]) for v in (values, exact))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_pbc_of_a_wrong_shape_is_named_in_the_error():
    arguments, pbc = random_batch(dtype=torch.float32), torch.ones(3, 3, dtype=torch.bool)
    for call in (to_gradient, to_virial):
        with pytest.raises(ValueError, match=r"torchcall: pbc: expected \(4, 3\), got \(3, 3\)"):
            call(*arguments, pbc)
    with pytest.raises(ValueError, match=r"torchcall: pbc: expected \(4, 3\), got \(3, 3\)"):
        to_gradient_jax(
            *as_jax(arguments[0], arguments[1], arguments[2].int(), *arguments[3:], pbc)
        )


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_accurate_far_from_the_origin(name):
    module, members = reference.potentials()[name], list(reference.systems().values())
    errors = []
    for shift in ([0.0, 0.0, 0.0], [1000.0, -800.0, 600.0]):
        # Positions that float32 represents exactly, so that both precisions see the same atoms.
        far = [m.moved(np.float32(m.positions + shift).astype(float), m.cell) for m in members]
        inputs = reference.graph(far)
        out = module(inputs)
        where = (-out["position_gradients"], inputs["pos"], inputs["batch"], inputs["cell"])
        near = inputs["pos"] - torch.tensor(shift, dtype=torch.float64)
        near[-1] = 0.0
        virial = to_virial(where[0], near, *where[2:], out["cell_gradients"])
        single = [v.float() if v.is_floating_point() else v for v in (*where, virial)]
        expected, size = out["cell_gradients"], out["cell_gradients"].abs().max()
        again = to_virial(*single[:4], expected.float())
        twin = np.asarray(to_gradient_jax(*as_jax(*single[:2], single[2].int(), *single[3:])))
        errors.append(
            [
                float((to_gradient(*single) - expected).abs().max() / size),
                float(np.abs(twin - expected.numpy()).max() / size),
                float((again - virial).abs().max() / virial.abs().max()),
            ]
        )
    assert np.max(errors) < 2e-6, errors


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    vectors=st.lists(
        st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=3, max_size=3
    ),
    zeros=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_is_the_pseudoinverse_for_any_rank_of_the_cell(vectors, zeros):
    forces, positions, batch, _, virial = random_batch(n_systems=1)  # forces sum to zero
    cell = torch.tensor([vectors], dtype=torch.float64)
    cell[0, torch.tensor(zeros)] = 0.0
    rows = cell[0][cell[0].any(1)].numpy()
    lengths = np.linalg.norm(rows, axis=1)
    sines = np.linalg.svd(rows / lengths[:, None], compute_uv=False) if len(rows) else np.ones(1)
    found = to_gradient(forces, positions, batch, cell, virial)[0].numpy()
    if np.prod(sines) < 1e-13:
        assert np.isnan(found).all()
    elif np.prod(sines) > 1e-6:
        total = virial[0].numpy() + positions.T.numpy() @ forces.numpy()
        expected = np.zeros((3, 3))
        expected[cell[0].any(1).numpy()] = np.linalg.pinv(rows, rcond=1e-15).T @ total
        scale = np.abs(np.linalg.pinv(rows, rcond=1e-15)).max(initial=0) * np.abs(total).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * scale)


FLAT = {
    "coplanar": [[1.1, 2.3, 0.4], [2.7, -1.2, 1.9], [3.8, 1.1, 2.3]],
    "nearly coplanar": [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1e-12]],
    "collinear": [[1.0, 2.0, 3.0], [0.5, 1.0, 1.5], [0.0, 1.0, 0.0]],
    "collinear and a zero vector": [[0.0, 0.0, 0.0], [1.1, 2.2, 3.3], [2.2, 4.4, 6.6]],
    "not a number": [[float("nan"), 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", list(FLAT))
def test_a_flat_cell_gives_nan_for_its_system_only(kind, dtype):
    forces, positions, batch, cell, virial = random_batch(dtype=dtype)
    expected = to_gradient(forces, positions, batch, cell, virial)
    cell[2] = torch.tensor(FLAT[kind], dtype=dtype)
    found = to_gradient(forces, positions, batch, cell, virial)
    assert found[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(found[others], expected[others])
    stress = mliap.stress_from_virial(virial, cell)
    assert stress[2].isnan().all()
    assert stress[others].isfinite().all()
    with jax.enable_x64(dtype == torch.float64):
        twin = to_gradient_jax(*as_jax(forces, positions, batch, cell, virial))
        assert np.isnan(twin[2]).all()
        assert np.isfinite(np.asarray(twin)[others.numpy()]).all()


def test_a_long_thin_cell_is_not_flat():
    cell = torch.tensor([[[1e-2, 0, 0], [0, 1e3, 0], [0, 9e2, 1e-1]]], dtype=torch.float64)
    virial = torch.eye(3, dtype=torch.float64)[None]
    none = torch.zeros(0, 3, dtype=torch.float64)
    found = to_gradient(none, none, torch.zeros(0, dtype=torch.int64), cell, virial)
    torch.testing.assert_close(found[0], torch.linalg.inv(cell[0]).T)


@pytest.mark.parametrize("single", [0, 1, 3, 4], ids=["forces", "positions", "cell", "virial"])
def test_mixed_precisions_are_promoted_to_the_highest(single):
    arguments = list(random_batch())
    rounded = [
        value.float().double() if k == single else value for k, value in enumerate(arguments)
    ]
    expected = to_gradient(*rounded)
    arguments[single] = arguments[single].float()
    found = to_gradient(*arguments)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    with jax.enable_x64(True):
        twin = to_gradient_jax(*as_jax(*arguments))
        assert twin.dtype == jnp.float64
        np.testing.assert_allclose(twin, expected, rtol=1e-12, atol=1e-12)
    assert to_virial(*arguments).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precisions_are_preserved_and_do_not_overflow(dtype):
    forces, positions, batch, cell, virial = random_batch(dtype=dtype)
    cell *= 50.0
    found = to_gradient(forces, positions, batch, cell, virial)
    exact = to_gradient(forces.double(), positions.double(), batch, cell.double(), virial.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_lattice_gradient_of_systems_without_atoms_is_that_of_the_virial(index):
    forces, positions, batch, cell, virial = random_batch(n_systems=3)
    batch = torch.where(batch == 1, 2, batch).to(index)
    found = to_gradient(forces, positions, batch, cell, virial)
    torch.testing.assert_close(found[1], torch.linalg.solve(cell[1].T, virial[1]))
    nobody = to_gradient(forces[:0], positions[:0], batch[:0], cell, virial)
    torch.testing.assert_close(nobody, torch.linalg.solve(cell.transpose(1, 2), virial))
    nothing = to_gradient(forces[:0], positions[:0], batch[:0], cell[:0], virial[:0])
    assert nothing.shape == (0, 3, 3)
    twin = to_gradient_jax(*as_jax(*(v[:0].float() for v in (forces, positions)), batch[:0].int(),
                                   cell.float(), virial.float()))  # fmt: skip
    np.testing.assert_allclose(twin, nobody, rtol=1e-5, atol=1e-5)
