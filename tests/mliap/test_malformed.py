"""Modules with wrong outputs are errors when they are wrapped; no module runs on invented data."""

import jax
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall import TorchModuleWrapper
from torchcall.mliap import TorchMliap, edge_vectors, energy_and_gradients, with_gradients
from torchcall.mliap._input import input_dtypes


def per_atom(input):
    r = edge_vectors(input)
    zeros = torch.zeros_like(input["pos"][:, 0])
    return zeros.index_add(0, input["edge_index"][0], torch.exp(-(r * r).sum(1)))


def per_system(input):
    return torch.zeros_like(input["charge"]).index_add(0, input["batch"], per_atom(input))


def full(input, **changes):
    """A right result, with changes; None removes a key."""
    out = with_gradients(module_of(per_system))(input) | changes
    return {key: value for key, value in out.items() if value is not None}


def module_of(function, name="Malformed"):
    def forward(self, input):
        del self
        return function(input)

    return type(name, (torch.nn.Module,), {"forward": forward})()


def error_of(wrap):
    with pytest.raises((TypeError, ValueError), match=r"^torchcall: Malformed: ") as caught:
        wrap()
    return str(caught.value)


ENERGIES = {
    "no energy": (lambda i: {"e": per_system(i)}, ["['energy']: expected this key, got ['e']"]),
    "a column": (lambda i: per_system(i)[:, None], ["(5,), got (5, 1)", "squeeze(-1)"]),
    "a sum": (lambda i: per_system(i).sum(), ["expected shape (5,), got ()", "index_add"]),
    "per atom": (per_atom, ["expected shape (5,), got (7,)", "energy per atom", "index_add"]),
    "nothing": (lambda _: None, ["expected a tensor, got None"]),
    "integers": (lambda i: per_system(i).long(), ["expected floats, got int64"]),
    "detached": (lambda i: per_system(i).detach(), ["an energy that autograd can", "detach()"]),
    "no_grad": (torch.no_grad()(per_system), ["an energy that autograd can differentiate"]),
    "gradients": (full, ["expected energies only", "use TorchMliap.from_module"]),
    "another key": (lambda i: i["positions"].sum(), ["one that reads 'positions'", "pos, atomic_"]),
}  # fmt: skip


@pytest.mark.parametrize("function, texts", ENERGIES.values(), ids=ENERGIES)
def test_malformed_energies_are_errors(function, texts):
    text = error_of(lambda: TorchMliap.from_energy(module_of(function), 4.0))
    assert all(part in text for part in texts), text


def virial(input):
    return input["cell"] * 0


OUTPUTS = {
    "energies only": (per_system, ["expected a dict", "TorchMliap.from_energy differentiates"]),
    "no energy": (lambda i: full(i, energy=None), ["['energy']: expected this key"]),
    "no gradients": (lambda i: full(i, position_gradients=None), ["from_energy differentiates"]),
    "forces": (
        lambda i: full(i, position_gradients=None, forces=-i["pos"]),
        ["['position_gradients']: expected this key", "return 'position_gradients' = -forces"],
    ),
    "a column": (lambda i: full(i, energy=per_system(i)[:, None]), ["(5,), got (5, 1)", "squeeze"]),
    "a sum": (lambda i: full(i, energy=per_system(i).sum()), ["(5,), got ()", "index_add"]),
    "gradients transposed": (
        lambda i: full(i, position_gradients=i["pos"].t()),
        ["['position_gradients']: expected shape (7, 3), got (3, 7)"],
    ),
    "gradients as numbers": (
        lambda i: full(i, position_gradients=1.0),
        ["output ['position_gradients']: expected a tensor, got float"],
    ),
    "no cell gradients": (
        lambda i: full(i, cell_gradients=None),
        ["['cell_gradients']: expected this key", "leave out compute_cell_gradients"],
    ),
    "a virial": (
        lambda i: full(i, cell_gradients=None, virial=virial(i)),
        ["'cell_gradients'", "lattice_gradient_from_virial converts the virial"],
    ),
    "a stress": (
        lambda i: full(i, cell_gradients=None, stress=virial(i)),
        ["lattice_gradient_from_virial converts the stress", "volume"],
    ),
    "flat cell gradients": (
        lambda i: full(i, cell_gradients=virial(i).flatten(1)),
        ["['cell_gradients']: expected shape (5, 3, 3), got (5, 9)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("function, texts", OUTPUTS.values(), ids=OUTPUTS)
def test_malformed_outputs_are_errors(function, texts):
    text = error_of(lambda: TorchMliap.from_module(module_of(function), 4.0, True))
    assert all(part in text for part in texts), text
    right = TorchMliap.from_module(module_of(full, "Right"), 4.0, True)
    wrapper = TorchModuleWrapper(
        module_of(function), requires_grad=True, input_spec=((input_dtypes(),), {})
    )
    assert error_of(lambda: TorchMliap(right.cutoff, wrapper, True)) == text


class Forces(torch.nn.Module):
    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        r = edge_vectors(input)
        e = torch.zeros_like(input["charge"]).index_add(0, input["batch"], input["pos"].sum(1))
        return {"energy": e * r.sum(), "forces": input["pos"]}


def test_archives_and_scripts_are_checked(tmp_path):
    script = torch.jit.script(Forces())
    script.save(tmp_path / "forces.pt")
    for model in (script, tmp_path / "forces.pt"):
        with pytest.raises(ValueError, match=r"torchcall: Forces.*= -forces"):
            TorchMliap.from_module(model, 4.0)


class OfPositions(torch.nn.Module):
    def forward(self, pos: torch.Tensor) -> torch.Tensor:
        return pos.sum()


class OfTwo(torch.nn.Module):
    def forward(self, pos: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return pos.sum() + batch.sum()


class OfAttributes(torch.nn.Module):
    def forward(self, input):
        return input.pos.sum()


OTHER_INPUTS = [
    OfPositions(),
    OfTwo(),
    OfAttributes(),
    torch.nn.Linear(3, 1),
    torch.nn.Conv2d(1, 1, 1),
]


@pytest.mark.parametrize("module", OTHER_INPUTS, ids=lambda module: type(module).__name__)
def test_modules_of_other_inputs_are_errors(module):
    def check(wrap, module):
        with pytest.raises(TypeError, match=r"input: expected .* takes one AtomGraphInput, a dict"):
            wrap(module, 4.0)

    check(TorchMliap.from_energy, module)
    check(TorchMliap.from_module, module)
    if not isinstance(module, OfAttributes):
        scripted = torch.jit.script(module)
        check(TorchMliap.from_energy, scripted)
        check(TorchMliap.from_module, scripted)


def test_forgotten_requires_grad_is_an_error():
    with pytest.raises(ValueError, match=r"torchcall: Malformed: .*expected requires_grad=True"):
        TorchMliap.from_module(module_of(full), 4.0, requires_grad=False)


# Precision


class Network(torch.nn.Module):
    """float32 weights in layers, which take float32 only, and a float64 constant."""

    def __init__(self, constant=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        if constant is not None:
            self.register_buffer("matrix", torch.ones(1, 1, dtype=constant))

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        r = edge_vectors(input)
        per_edge = self.layer(torch.exp(-(r * r).sum(1, keepdim=True)))
        if hasattr(self, "matrix"):
            per_edge = per_edge @ self.matrix
        system = input["batch"].index_select(0, input["edge_index"][0])
        zeros = torch.zeros(input["cell"].size(0), dtype=per_edge.dtype)
        return zeros.index_add(0, system, per_edge.squeeze(1))


class Differentiating(Network):
    def forward(self, input):
        pos = input["pos"].detach().requires_grad_(True)
        energy = Network.forward(self, input | {"pos": pos})
        (gradients,) = torch.autograd.grad(energy.sum(), pos)
        return {"energy": energy.detach(), "position_gradients": gradients}


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_modules_that_take_their_weights_dtype_only_get_it(weights, positions):
    import graphs

    graph = graphs.atom_graph([reference.systems()["triclinic"]], dtype=positions)
    module = Differentiating().to(weights)
    found = energy_and_gradients(TorchMliap.from_module(module, CUTOFF), graph)
    expected = energy_and_gradients(TorchMliap.from_energy(module_like(module), CUTOFF), graph)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-6)
    assert found.position_gradients.dtype == positions


def module_like(module):
    network = Network().to(module.layer.weight.dtype)
    network.load_state_dict(module.state_dict())
    return network


def test_modules_that_take_both_dtypes_get_the_positions():
    """Small constants promote: a cast would lose precision."""

    def precision(input):
        seen.add(input["pos"].dtype)
        return full(input)

    seen = set()
    module = module_of(precision)
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    with jax.enable_x64(True):
        model = TorchMliap.from_module(module, CUTOFF)
        spec = model.wrapper._options["input_spec"][0][0]
    assert spec["pos"] is None


def test_weights_of_two_dtypes_are_an_error_that_names_the_option():
    with pytest.raises(TypeError, match=r"got float32, float64; dtype='float32' casts them"):
        TorchMliap.from_energy(Network(torch.float64), 4.0)
    TorchMliap.from_energy(Network(torch.float64), 4.0, dtype="float32")


# What the check must not do


def test_modules_that_fake_tensors_cannot_trace_are_not_checked():
    def by_values(input):
        return per_system(input) * input["pos"].max().item()

    TorchMliap.from_energy(module_of(by_values), 4.0)
    TorchMliap.from_module(module_of(lambda i: by_values(i) and full(i)), 4.0)


def test_the_check_runs_no_kernel_and_changes_no_state():
    kinds = []

    def forward(self, input):
        kinds.append(type(input["pos"]).__name__)
        self.last = input["pos"]
        self.count += 1
        return full(input)

    module = module_of(full, "Counting")
    type(module).forward = forward
    module.register_buffer("count", torch.zeros(()))
    model = TorchMliap.from_module(module, 4.0)
    assert set(kinds) == {"FakeTensor"}
    assert module.count == 0
    assert not hasattr(module, "last")
    before = len(kinds)
    jax.tree.map(lambda leaf: leaf, model)  # rebuilds the pytree
    assert len(kinds) == before


def test_a_wrapper_of_another_function_is_an_error_and_remains_usable():
    cutoff = TorchMliap.from_module(module_of(full), 4.0).cutoff
    wrapper = TorchModuleWrapper(torch.nn.functional.softplus)
    with pytest.raises(TypeError, match=r"input: expected .* takes one AtomGraphInput, a dict"):
        TorchMliap(cutoff, wrapper)
    np.testing.assert_allclose(wrapper(np.zeros(2, np.float32)), np.log(2.0), rtol=1e-6)
