"""Lattice gradients inside scripted and exported models, called from JAX, and their JAX twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from reference import as_jax, one_thread, random_batch  # noqa: F401

import torchcall
from torchcall import mliap

# torch warns that TorchScript is deprecated; its exporter uses deprecated classes of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


def compiled(function):
    """The function with its jaxtyping annotations enforced while it is traced."""
    return jax.jit(jaxtyped(typechecker=beartype)(function))


to_gradient = mliap.lattice_gradient_from_virial
to_virial = mliap.virial_from_lattice_gradient
to_gradient_jax = compiled(mliap.lattice_gradient_from_virial_jax)
to_virial_jax = compiled(mliap.virial_from_lattice_gradient_jax)


class Strained(torch.nn.Module):
    """A model like MACE: forces, and a virial from one symmetric strain.

    Its `cell_gradients` come from `torchcall.mliap.lattice_gradient_from_virial`, in `forward`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos, cell, batch = input["pos"], input["cell"], input["batch"]
        pos = pos.detach().requires_grad_(True)
        strain = torch.zeros_like(cell).requires_grad_(True)
        strain_s = 0.5 * (strain + strain.transpose(1, 2))
        moved = pos + (pos.unsqueeze(1) @ strain_s.index_select(0, batch)).squeeze(1)
        energy = self.model.energy(
            moved, cell + cell @ strain_s, input["edge_index"], input["cell_offsets"], batch
        )
        gradients = torch.autograd.grad([energy.sum()], [pos, strain])
        by_position, virial = gradients[0], gradients[1]
        assert by_position is not None
        assert virial is not None
        return {
            "energy": energy.detach(),
            "position_gradients": by_position,
            "cell_gradients": mliap.lattice_gradient_from_virial(
                -by_position, pos.detach(), batch, cell, virial, input["pbc"]
            ),
            "virial": virial,
        }


def silicon():
    """Stillinger–Weber, all kinds of systems in one batch, and the outputs by autograd."""
    module = reference.potentials()["Stillinger-Weber"]
    inputs = reference.graph(list(reference.systems().values()))
    return module, inputs, module(inputs)


def test_conversion_works_in_eager_scripted_and_loaded_modules(tmp_path):
    module, inputs, out = silicon()
    scripted = torch.jit.script(Strained(module))
    scripted.save(tmp_path / "strained.pt")
    for adapter in (Strained(module), scripted, torch.jit.load(tmp_path / "strained.pt")):
        found = adapter(inputs)
        for key, value in out.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_conversion_works_in_a_module_that_a_jitted_program_calls():
    module, inputs, out = silicon()
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Strained(module)), requires_grad=True)
    found = jax.jit(wrapper)({key: jnp.asarray(value.numpy()) for key, value in inputs.items()})
    np.testing.assert_allclose(found["cell_gradients"], out["cell_gradients"], rtol=0, atol=1e-11)


class Everything(torch.nn.Module):
    """Gradient, virial, stress in both conventions, pressure."""

    def forward(
        self,
        forces: torch.Tensor,
        positions: torch.Tensor,
        batch: torch.Tensor,
        cell: torch.Tensor,
        virial: torch.Tensor,
        pbc: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = mliap.lattice_gradient_from_virial(forces, positions, batch, cell, virial, pbc)
        stress = mliap.stress_from_virial(virial, cell)
        return (
            gradient,
            mliap.virial_from_lattice_gradient(forces, positions, batch, cell, gradient, pbc),
            stress,
            mliap.stress_from_virial(virial, cell, convention="kups", pbc=pbc),
            mliap.pressure_from_stress(stress, pbc, convention="ase"),
        )


def all_kinds_of_pbc(n_systems):
    """`(B, 3)` bool, different for each system."""
    return torch.tensor([[bool(k >> axis & 1) for axis in range(3)] for k in range(n_systems)])


def test_conversions_export_with_dynamic_shapes_and_without_host_reads():
    atoms, members = torch.export.Dim("atoms"), torch.export.Dim("systems")
    program = torch.export.export(
        Everything(),
        (*random_batch(), all_kinds_of_pbc(4)),
        dynamic_shapes=(*[{0: atoms}] * 3, *[{0: members}] * 3),
    ).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for forbidden in ("linalg", "item", "_local_scalar", "nonzero", "cpu", "assert_async"):
        assert not any(forbidden in target for target in targets), targets
    arguments = (*random_batch(seed=3, n_systems=7, n_atoms=31), all_kinds_of_pbc(7))
    arguments[3][1, 2] = 0.0
    torch.jit.script(Everything())(*arguments)
    for found, expected in zip(program.module()(*arguments), Everything()(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13, equal_nan=True)


def degenerate_batch(dtype):
    arguments = random_batch(n_systems=9, n_atoms=30, dtype=dtype)
    cell = arguments[3]
    zeros = [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]]
    for k, rows in enumerate(zeros):
        cell[k, rows] = 0.0
    cell[7, 2] = cell[7, 0] + cell[7, 1]
    return arguments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jax_twins_agree_with_torch(dtype):
    arguments = degenerate_batch(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    with jax.enable_x64(dtype == torch.float64):
        given = as_jax(*arguments)
        for torch_function, jax_function in (
            (to_gradient, to_gradient_jax),
            (to_virial, to_virial_jax),
        ):
            expected = torch_function(*arguments).numpy()
            found = jax_function(*given)
            assert found.dtype == expected.dtype
            scale = np.nanmax(np.abs(expected))
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)
            pbc = all_kinds_of_pbc(len(expected))
            expected = torch_function(*arguments, pbc).numpy()
            found = jax_function(*given, *as_jax(pbc))
            assert not np.isnan(expected[:3]).any()
            scale = np.nanmax(np.abs(expected))
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures("x64")
def test_jax_twin_works_under_vmap_and_grad():
    forces, positions, batch, cell, virial = as_jax(*degenerate_batch(torch.float64))
    cells = jnp.stack([cell, 2.0 * cell])
    mapped = jax.vmap(to_gradient_jax, (None, None, None, 0, None))(
        forces, positions, batch, cells, virial
    )
    for found, h in zip(mapped, cells, strict=True):
        expected = to_gradient_jax(forces, positions, batch, h, virial)
        np.testing.assert_allclose(found, expected, rtol=1e-13)

    def total(virial, forces):
        return jnp.nansum(to_gradient_jax(forces, positions, batch, cell, virial))

    for derivative in jax.jit(jax.grad(total, (0, 1)))(virial, forces):
        assert np.isfinite(derivative).all()


@pytest.mark.usefixtures("x64")
def test_jax_twin_ignores_atoms_of_systems_out_of_range():
    forces, positions, batch, cell, virial = degenerate_batch(torch.float64)
    expected = to_gradient(forces[:-2], positions[:-2], batch[:-2], cell, virial)
    batch[-2:] = torch.tensor([len(cell), -1])
    found = to_gradient_jax(*as_jax(forces, positions, batch, cell, virial))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "position, name, expected, got",
    [
        (0, "forces", "(12, 3) as positions", "(11, 3)"),
        (1, "positions", "(N, 3)", "(12,)"),
        (2, "batch", "(12,) as positions", "(11,)"),
        (3, "cell", "(B, 3, 3)", "(3, 3)"),
        (4, "virial", "(4, 3, 3) as the cell", "(1, 3, 3)"),
        (4, "virial", "(B, 3, 3)", "(4, 9)"),
    ],
)
def test_arguments_of_wrong_shape_are_named_in_the_error(position, name, expected, got):
    arguments = [value.float() if k != 2 else value.int() for k, value in enumerate(random_batch())]
    wrong = {
        "(11, 3)": lambda v: v[1:],
        "(12,)": lambda v: v[:, 0],
        "(11,)": lambda v: v[1:],
        "(3, 3)": lambda v: v[0],
        "(1, 3, 3)": lambda v: v[:1],
        "(4, 9)": lambda v: v.reshape(4, 9),
    }
    arguments[position] = wrong[got](arguments[position])
    message = f"torchcall: {name}: expected {expected}, got {got}"
    with pytest.raises(ValueError, match=r"^torchcall: ") as error:
        to_gradient(*arguments)
    assert str(error.value) == message
    with pytest.raises(ValueError, match=r"^torchcall: ") as error:
        mliap.lattice_gradient_from_virial_jax(*as_jax(*arguments))
    assert str(error.value) == message
