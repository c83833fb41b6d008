"""The Lennard-Jones example, compared with NumPy formulas and finite differences in float64."""

import sys
from pathlib import Path

import ase.neighborlist
import numpy as np
import pytest
import torch
from ase import Atoms

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

EXAMPLES = Path(__file__).parents[1] / "examples"
CUTOFF, ONSET, EPSILON, SIGMA = 6.0, 5.0, 0.0104, 3.40
TRICLINIC = np.array([[7.9, 0.3, -0.4], [1.6, 8.3, 0.5], [-0.9, 1.2, 9.1]])
OTHER = np.array([[9.2, 0.0, 0.0], [-2.0, 8.1, 0.0], [0.7, 1.1, 7.7]])


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import lennard_jones
    finally:
        sys.path.remove(str(EXAMPLES))
    return lennard_jones


@pytest.fixture(scope="module")
def modules(example):
    """Scripted modules, differentiating analytically and by autograd, with cell gradients."""
    options = {"cutoff": CUTOFF, "onset": ONSET, "cell_gradients": True}
    return {
        "analytic": torch.jit.script(example.LennardJones(EPSILON, SIGMA, **options)),
        "autograd": torch.jit.script(
            example.LennardJones(EPSILON, SIGMA, **options, autograd=True)
        ),
    }


def pair_energy(r):
    """φ(r) from the definition: 12-6 times the quintic switch in r²."""
    x = np.clip((r**2 - ONSET**2) / (CUTOFF**2 - ONSET**2), 0.0, 1.0)
    switch = 1.0 - 10.0 * x**3 + 15.0 * x**4 - 6.0 * x**5
    return 4.0 * EPSILON * ((SIGMA / r) ** 12 - (SIGMA / r) ** 6) * switch


def pairs(positions, cell, cutoff=CUTOFF):
    atoms = Atoms("Ar" * len(positions), positions=positions, cell=cell, pbc=True)
    return ase.neighborlist.neighbor_list("ijS", atoms, cutoff)


def energy_of(positions, cell, i, j, offsets):
    r = positions[j] - positions[i] + offsets @ cell
    return 0.5 * pair_energy(np.linalg.norm(r, axis=1)).sum()


def crystal(cell, seed, n=3):
    """A distorted lattice of n³ atoms, some outside the cell."""
    generator = np.random.default_rng(seed)
    frac = np.stack(np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij"), -1).reshape(-1, 3)
    wraps = generator.integers(-1, 2, frac.shape)
    return (frac + wraps) @ cell + generator.normal(scale=0.1, size=frac.shape)


def graph(systems, *, phantom=True, extra=3, cutoff=CUTOFF):
    """The `AtomGraphInput` of `(positions, cell)` systems, with `extra` sentinel edges."""
    pos, cells, batch, edges, offsets, n = [], [], [], [], [], 0
    for k, (positions, cell) in enumerate(systems):
        i, j, shift = pairs(positions, cell, cutoff)
        edges.append(np.stack([i, j]) + n)
        offsets.append(shift)
        pos.append(positions)
        cells.append(cell)
        batch += [k] * len(positions)
        n += len(positions)
    if phantom:
        pos.append(np.zeros((1, 3)))
        cells.append(np.eye(3) * 2 * CUTOFF)
        batch.append(len(systems))
        edges.append(np.full((2, extra), n))
        offsets.append(np.tile([1, 0, 0], (extra, 1)))
    return {
        "pos": torch.tensor(np.concatenate(pos)),
        "cell": torch.tensor(np.stack(cells)),
        "batch": torch.tensor(batch),
        "edge_index": torch.tensor(np.concatenate(edges, 1)),
        "cell_offsets": torch.tensor(np.concatenate(offsets), dtype=torch.float64),
    }


def systems_of(count):
    cells = [TRICLINIC * 1.4, OTHER * 1.45, TRICLINIC.T * 1.5][:count]
    return [(crystal(cell, seed), cell) for seed, cell in enumerate(cells)]


@pytest.mark.parametrize("derivative", ["analytic", "autograd"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("phantom", [True, False], ids=["with phantoms", "without phantoms"])
def test_energy_is_the_sum_over_a_systems_pairs(modules, derivative, count, phantom):
    systems = systems_of(count)
    out = modules[derivative](graph(systems, phantom=phantom))
    expected = [energy_of(p, c, *pairs(p, c)) for p, c in systems] + [0.0] * phantom
    np.testing.assert_allclose(out["energy"].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("derivative", ["analytic", "autograd"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_match_finite_differences_on_triclinic_cells(modules, derivative, count):
    systems = systems_of(count)
    out = modules[derivative](graph(systems))
    h, first = 1e-4, 0
    for k, (positions, cell) in enumerate(systems):
        edges = pairs(positions, cell, CUTOFF + 0.1)

        def energy(p, c, edges=edges):
            return energy_of(p, c, *edges)

        by_position = central_difference(lambda p, c=cell, f=energy: f(p, c), positions, h)
        by_cell = central_difference(lambda c, p=positions, f=energy: f(p, c), cell, h)
        found = out["position_gradients"][first : first + len(positions)].numpy()
        np.testing.assert_allclose(found, by_position, atol=1e-9)
        np.testing.assert_allclose(out["cell_gradients"][k].numpy(), by_cell, atol=1e-8)
        first += len(positions)


def central_difference(f, x, h):
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        far, near = f(x + 2 * step) - f(x - 2 * step), f(x + step) - f(x - step)
        result[index] = (8 * near - far) / (12 * h)
    return result


@pytest.mark.parametrize("count", [1, 2, 3])
def test_analytic_gradients_equal_autograd(modules, count):
    inputs = graph(systems_of(count))
    analytic, autograd = modules["analytic"](inputs), modules["autograd"](inputs)
    for key in ("energy", "position_gradients", "cell_gradients"):
        np.testing.assert_allclose(analytic[key].numpy(), autograd[key].numpy(), atol=1e-13)


@pytest.mark.parametrize("derivative", ["analytic", "autograd"])
def test_phantoms_and_pairs_beyond_the_cutoff_contribute_exactly_zero(modules, derivative):
    systems = systems_of(1)
    plain = modules[derivative](graph(systems, phantom=True, extra=2))
    padded = modules[derivative](graph(systems, phantom=True, extra=50, cutoff=CUTOFF + 1.0))
    for out in (plain, padded):
        assert out["energy"][-1] == 0.0
        assert not out["position_gradients"][-1].any()
        assert not out["cell_gradients"][-1].any()
        assert all(torch.isfinite(value).all() for value in out.values())
    for key in plain:
        np.testing.assert_allclose(plain[key].numpy(), padded[key].numpy(), atol=1e-14)


@pytest.mark.parametrize("derivative", ["analytic", "autograd"])
def test_an_isolated_atom_has_zero_energy_and_gradients(modules, derivative):
    lonely = [(np.zeros((1, 3)), np.eye(3) * 50.0)]
    out = modules[derivative](graph(lonely))
    assert all(not value.any() for value in out.values())


def test_energy_and_its_first_two_derivatives_are_continuous_at_onset_and_cutoff(example):
    module = example.LennardJones(EPSILON, SIGMA, CUTOFF, ONSET)
    step = 1e-7
    for edge in (ONSET, CUTOFF):
        u = torch.tensor([(edge - step) ** 2, (edge + step) ** 2], dtype=torch.float64)
        u.requires_grad_(True)
        energy, slope = module.pair(u)
        (curvature,) = torch.autograd.grad(slope.sum(), u)
        for values in (energy, slope, curvature):
            assert abs(values[1] - values[0]) < 1e-7 * EPSILON + 2e-6 * abs(values[0].item())


def test_pair_slope_is_the_derivative_of_pair_energy(example):
    module = example.LennardJones(EPSILON, SIGMA, CUTOFF, ONSET)
    u = torch.linspace(9.0, 40.0, 200, dtype=torch.float64, requires_grad=True)
    energy, slope = module.pair(u)
    (derivative,) = torch.autograd.grad(energy.sum(), u)
    np.testing.assert_allclose(slope.detach().numpy(), derivative.numpy(), rtol=1e-10, atol=1e-16)


def test_float32_inputs_give_accurate_float32_outputs(modules):
    double = graph(systems_of(1))
    single = {k: v.float() if v.is_floating_point() else v for k, v in double.items()}
    exact, found = modules["analytic"](double), modules["analytic"](single)
    for key, value in found.items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), exact[key].numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("onset", [-0.1, 6.0, 7.0])
def test_an_onset_outside_the_cutoff_is_an_error(example, onset):
    with pytest.raises(ValueError, match=r"onset: expected a distance in \[0, cutoff = 6.0\)"):
        example.LennardJones(EPSILON, SIGMA, CUTOFF, onset)


def test_the_program_writes_an_archive_that_loads(example, tmp_path, monkeypatch):
    path = tmp_path / "lj.pt"
    monkeypatch.setattr(sys, "argv", ["lennard_jones.py", str(path), "--cutoff", "6.0"])
    example.main()
    inputs = graph(systems_of(1))
    loaded = torch.jit.load(path)(inputs)
    expected = example.LennardJones(EPSILON, SIGMA, 6.0)(inputs)
    torch.testing.assert_close(loaded["energy"], expected["energy"])
