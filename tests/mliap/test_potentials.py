"""The example potentials against JAX twins, finite differences, symmetries and silicon."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from graphs import QUICK
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAMES = ["Lennard-Jones", "Stillinger-Weber", "message passing"]
KINDS = list(reference.systems())
OUTPUTS = ("energy", "position_gradients", "cell_gradients")
GPA = 160.21766208


@pytest.fixture(scope="module")
def modules():
    return reference.potentials()


def assert_close(found, expected, tolerance):
    """Differences relative to the largest expected number."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def real_part(out, members):
    """The rows of the real systems and atoms, in NumPy."""
    n = sum(len(member.numbers) for member in members)
    rows = {key: n if key == "position_gradients" else len(members) for key in OUTPUTS}
    return {key: out[key][: rows[key]].numpy() for key in OUTPUTS}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_gradients_equal_those_of_the_jax_twin(modules, name):
    members = [reference.systems()[kind] for kind in ("triclinic", "slab", "molecule")]
    out, first = modules[name](reference.graph(members)), 0
    for k, member in enumerate(members):
        energy = reference.twin(name, modules[name], member)
        differentiate = jax.jit(jax.value_and_grad(energy, (0, 1)), compiler_options=QUICK)
        value, (by_position, by_cell) = differentiate(member.positions, member.cell)
        last = first + len(member.numbers)
        np.testing.assert_allclose(out["energy"][k], value, rtol=1e-12)
        assert_close(out["position_gradients"][first:last], by_position, 1e-12)
        scale = max(abs(by_cell).max(), abs(by_position).max())
        np.testing.assert_allclose(out["cell_gradients"][k], by_cell, rtol=0, atol=1e-12 * scale)
        first = last


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["triclinic", "slab", "molecule"])
def test_gradients_equal_fourth_order_differences(modules, name, kind):
    member = reference.systems()[kind]
    out = real_part(modules[name](reference.graph([member])), [member])
    by_position = reference.position_derivative(modules[name], member)
    by_cell = reference.cell_derivative(modules[name], member, fixed="cartesian")
    assert_close(out["position_gradients"], by_position, 1e-8)
    if kind == "molecule":
        assert not out["cell_gradients"].any()
    else:
        assert_close(out["cell_gradients"][0], by_cell, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_result_and_has_zero_gradients(modules, name):
    members = list(reference.systems().values())
    bare = modules[name](reference.graph(members, phantom=False))
    for n_atoms, n_edges in ((1, 2), (7, 100)):
        padded = reference.graph(members, n_atoms=n_atoms, n_edges=n_edges, reach=CUTOFF + 1.0)
        out = modules[name](padded)
        assert all(torch.isfinite(value).all() for value in out.values())
        assert not out["position_gradients"][-n_atoms:].any()
        assert not out["cell_gradients"][-1].any()
        for key, value in real_part(out, members).items():
            assert_close(value, bare[key], 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_systems_of_a_batch_do_not_affect_each_other(modules, name):
    members = list(reference.systems().values())
    batched = modules[name](reference.graph(members))
    alone = [real_part(modules[name](reference.graph([m])), [m]) for m in members]
    for key, value in real_part(batched, members).items():
        assert_close(value, np.concatenate([out[key] for out in alone]), 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_empty_systems_and_lone_atoms_have_zero_gradients(modules, name):
    lone = reference.System(np.zeros((1, 3)), np.array([14]), np.eye(3) * 30.0, np.ones(3, bool))
    empty = reference.System(np.zeros((0, 3)), np.array([], int), lone.cell, lone.pbc)
    full = reference.systems()["triclinic"]
    alone = modules[name](reference.graph([full]))
    for members in ([lone], [lone, empty], [empty, full, empty]):
        inputs = reference.graph(members)
        out = modules[name](inputs)
        assert all(torch.isfinite(value).all() for value in out.values())
        for k, member in enumerate(members):
            if member is full:
                assert_close(out["energy"][k], alone["energy"][0], 1e-13)
            else:
                atoms = out["position_gradients"][inputs["batch"] == k]
                assert not atoms.any()
                assert not out["cell_gradients"][k].any()
    no_edges = modules[name](reference.graph([lone], phantom=False))
    assert all(torch.isfinite(value).all() for value in no_edges.values())


@pytest.mark.parametrize("name", NAMES)
def test_results_follow_rotations_translations_and_permutations(modules, name):
    member = reference.systems()["triclinic"]
    generator = np.random.default_rng(7)
    q = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    order = generator.permutation(len(member.numbers))
    out = real_part(modules[name](reference.graph([member])), [member])

    turned = member.moved(member.positions @ q, member.cell @ q)
    found = real_part(modules[name](reference.graph([turned])), [turned])
    assert_close(found["energy"], out["energy"], 1e-12)
    assert_close(found["position_gradients"], out["position_gradients"] @ q, 1e-12)
    assert_close(found["cell_gradients"], out["cell_gradients"] @ q, 1e-12)

    moved = member.moved(member.positions + generator.normal(size=3), member.cell)
    found = real_part(modules[name](reference.graph([moved])), [moved])
    for key in OUTPUTS:
        assert_close(found[key], out[key], 1e-12)

    shuffled = reference.System(
        member.positions[order], member.numbers[order], member.cell, member.pbc
    )
    found = real_part(modules[name](reference.graph([shuffled])), [shuffled])
    assert_close(found["energy"], out["energy"], 1e-12)
    assert_close(found["position_gradients"], out["position_gradients"][order], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_energies_and_gradients_are_continuous_at_the_cutoff(modules, name):
    module = modules[name]
    cell, numbers = np.eye(3) * 20.0, np.array([14, 6, 14])
    outs = []
    for side in (-1e-5, 1e-5):
        positions = np.array([[0, 0, 0], [module.cutoff + side, 0, 0], [0, 2.4, 0]])
        member = reference.System(positions, numbers, cell, np.ones(3, bool))
        outs.append(module(reference.graph([member], reach=CUTOFF + 0.5)))
    for key in ("energy", "position_gradients"):
        np.testing.assert_allclose(outs[0][key], outs[1][key], rtol=0, atol=1e-8)


def diamond(lattice_constant):
    corners = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]]) / 4
    frac = np.concatenate([corners, corners + 0.25])
    cell = np.eye(3) * lattice_constant
    return reference.System(frac @ cell, np.full(8, 14), cell, np.ones(3, bool))


def test_silicon_has_the_published_ground_state_and_elastic_constants(modules):
    module, sigma, epsilon = modules["Stillinger-Weber"], 2.0951, 2.1683
    # The pair term has its minimum of −ε at 2^(1/6) σ. Each atom has four bonds, each shared by two
    # atoms, at angles of zero energy.
    a = 4.0 / np.sqrt(3.0) * 2.0 ** (1.0 / 6.0) * sigma
    ground = diamond(a)
    assert abs(a - 5.431) < 1e-3
    out = module(reference.graph([ground]))
    np.testing.assert_allclose(out["energy"][0], -2.0 * epsilon * 8, rtol=1e-8)
    np.testing.assert_allclose(reference.strain_derivative(module, ground), 0.0, atol=1e-5)

    step = 1e-4
    stress = []
    for strain in (step, -step):
        deform = np.diag([1.0 + strain, 1.0, 1.0])
        member = ground.moved(ground.positions @ deform, ground.cell @ deform)
        stress.append(reference.strain_derivative(module, member) / np.linalg.det(member.cell))
    slope = (stress[0] - stress[1]) / (2 * step) * GPA
    # E. R. Cowley, Phys. Rev. Lett. 60, 2379 (1988).
    np.testing.assert_allclose(slope[0, 0], 151.4, rtol=2e-3)
    np.testing.assert_allclose(slope[1, 1], 76.4, rtol=2e-3)


def test_network_depends_on_the_elements_and_the_seed(modules):
    module = modules["message passing"]
    member = reference.systems()["triclinic"]
    inputs = reference.graph([member])
    before = module(inputs)["energy"][0]
    inputs["atomic_numbers"][0] = 20 - inputs["atomic_numbers"][0]
    assert abs(module(inputs)["energy"][0] - before) > 1e-3

    network = reference.example("message_passing").MessagePassing
    state = torch.random.get_rng_state()
    same, other = network(CUTOFF).state_dict(), network(CUTOFF, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value.float(), same[key]) for key, value in module.state_dict().items())
    assert not torch.equal(same["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_agrees_with_double_precision(modules, name):
    members = [reference.systems()[kind] for kind in ("triclinic", "wire")]
    exact = real_part(modules[name](reference.graph(members)), members)
    single = reference.potentials()[name].float()
    out = real_part(single(reference.graph(members, dtype=torch.float32)), members)
    for key in OUTPUTS:
        assert out[key].dtype == np.float32
        assert_close(out[key], exact[key], 2e-5)


def test_network_computes_in_the_precision_of_its_weights(modules):
    inputs = reference.graph([reference.systems()["triclinic"]], dtype=torch.float32)
    assert {out.dtype for out in modules["message passing"](inputs).values()} == {torch.float64}


@pytest.mark.parametrize("name", ["stillinger_weber", "message_passing"])
def test_example_programs_write_archives_that_load(name, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    module = reference.example(name)
    monkeypatch.setattr(sys, "argv", [name, str(path), "--cell-gradients"])
    module.main()
    cls = module.MessagePassing if name == "message_passing" else module.StillingerWeber
    inputs = reference.graph([reference.systems()["triclinic"]], dtype=torch.float32)
    expected, found = cls(cell_gradients=True)(inputs), torch.jit.load(path)(inputs)
    for key in OUTPUTS:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scripted_modules_give_the_same_numbers(modules, name):
    members = list(reference.systems().values())
    scripted = torch.jit.script(modules[name])
    for chosen in (members, members[:1]):
        inputs = reference.graph(chosen)
        for key, value in modules[name](inputs).items():
            assert_close(scripted(inputs)[key], value, 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_a_jitted_jax_program_gets_the_same_numbers(modules, name):
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(modules[name]), requires_grad=True)
    inputs = reference.graph([reference.systems()[kind] for kind in ("triclinic", "slab")])
    out = jax.jit(wrapper)({key: jnp.asarray(value.numpy()) for key, value in inputs.items()})
    for key, value in modules[name](inputs).items():
        assert_close(out[key], value, 1e-12)
