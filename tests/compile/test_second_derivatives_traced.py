"""`torchcall.mliap.compile(..., second_derivatives=True)`: what is traced, and what is refused.

torch's compiler is replaced by a function that runs the traced graphs, which are compared with the
module's second derivatives. `mliap/test_second_derivatives_of_packages.py` tests a package.
"""

import pytest
import reference
import torch
from energies import Pairs, Soft, odd
from engines import capacity_of
from reference import CUTOFF

import torchcall


def compiled(module, tmp_path, example, **options):
    options = {"cutoff": CUTOFF, "second_derivatives": True} | options
    return torchcall.mliap.compile(module, tmp_path / "m.pt2", example=example, **options)


class Inside(torch.nn.Module):
    """Differentiates inside, with or without a graph of the gradients."""

    def __init__(self, *, create_graph, cell_gradients=True):
        super().__init__()
        self.energies = Soft()
        self.create_graph = create_graph
        self.keys = ("pos", "cell") if cell_gradients else ("pos",)

    def forward(self, input):
        leaves = {
            key: input[key] if input[key].requires_grad else input[key].detach().requires_grad_()
            for key in self.keys
        }
        energy = self.energies(input | leaves)
        found = torch.autograd.grad(
            energy.sum(), list(leaves.values()), create_graph=self.create_graph
        )
        names = ("position_gradients", "cell_gradients")
        return {"energy": energy, **dict(zip(names, found, strict=False))}


class Once(torch.autograd.Function):
    """exp, with a backward that torch cannot differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def confined(input, energies):
    """Springs to the origin, which do not depend on the cell."""
    per_atom = input["pos"].square().sum(1)
    return torch.zeros_like(energies).index_add(0, input["batch"], per_atom)


def linear(input, energies):
    """Energies with constant gradients."""
    per_atom = input["pos"][:, 0]
    return torch.zeros_like(energies).index_add(0, input["batch"], per_atom)


@pytest.mark.parametrize(
    "module, gradients",
    [
        (Pairs(), ["pos", "cell"]),
        (odd(confined), ["pos", "cell"]),
        (odd(linear), ["pos", "cell"]),
        (odd(lambda i, e: e * i["pos"].mul_(1.5).sum()), ["pos", "cell"]),
        (Inside(create_graph=True), ["pos", "cell"]),
        (Inside(create_graph=True, cell_gradients=False), ["pos"]),
    ],
    ids=[
        "pairs",
        "without cells",
        "constant gradients",
        "writes",
        "inside",
        "inside, positions only",
    ],
)
def test_second_derivatives_are_traced_for_any_shapes(
    module, gradients, uncompiled, tmp_path, example
):
    compiled(module, tmp_path, example, dynamic=True)
    (own,) = uncompiled
    assert own["gradients"] == gradients
    assert capacity_of(own) is None


def test_second_derivatives_for_a_capacity_and_in_single_precision(uncompiled, tmp_path):
    example = reference.graph([reference.systems()["triclinic"]], dtype=torch.float32)
    compiled(Pairs(), tmp_path, example, dynamic=False)
    (own,) = uncompiled
    assert capacity_of(own) is not None
    assert own["gradients"] == ["pos", "cell"]


def test_a_package_with_second_derivatives_is_another_one(uncompiled, tmp_path, example):
    for second in (False, True, False, True):
        compiled(Soft(), tmp_path, example, second_derivatives=second)
    assert len(uncompiled) == 2
    assert len({own["content"] for own in uncompiled}) == 2


@pytest.mark.parametrize(
    "module, text",
    [
        (Inside(create_graph=False), "got an error; pass create_graph=True .* and do not detach"),
        (odd(lambda _, e: Once.apply(e)), "can differentiate, got an error"),
        (
            odd(lambda i, e: e * (i["cell"][:, 0, 1] ** 2 + 1e-320).pow(0.75)),
            r"'second derivatives by cell'\]: expected finite",
        ),
    ],
    ids=["detached", "differentiable once", "not finite"],
)
def test_second_derivatives_that_do_not_exist_are_an_error(
    module, text, uncompiled, tmp_path, example
):
    del uncompiled
    example = example | {"cell": example["cell"].clone()}
    example["cell"][:, 0, 1] = 0
    with pytest.raises(torchcall.CompileError, match="torchcall: .*" + text):
        compiled(module, tmp_path, example)
    assert not (tmp_path / "m.pt2").exists()
