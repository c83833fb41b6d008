"""Names and signatures of kUPS' torch interface."""

import inspect
import re
import typing

import pytest

import torchcall
from torchcall import mliap

# Name → its parameters, "name" or "name=default"; `*` starts the keyword-only ones.
FUNCTIONS = {
    "lattice_gradient_from_virial": "forces positions batch cell virial pbc=None",
    "torch_mliap_model_fn": "inp * compute_cell_gradients=False",
    "make_torch_mliap_from_state": "state * compute_position_and_cell_gradients=False",
    "make_torch_mliap_potential": (
        "particles_view systems_view neighborlist_view model cutoffs_view "
        "compute_cell_gradients=False patch_idx_view=None out_cache_lens=None"
    ),
}
# Name → attributes and methods.
CLASSES = {
    "AtomGraphInput": "pos atomic_numbers cell pbc edge_index cell_offsets batch charge spin",
    "Edges": "indices shifts",
    "EmptyType": "",
    "HasAtomicNumbers": "atomic_numbers",
    "HyperGraph": "particles systems edges",
    "IdPatch": "__call__",
    "Index": "keys indices",
    "IsRadiusGraphPoints": "positions system",
    "IsTorchMliapParticles": "positions atomic_numbers system",
    "IsTorchMliapState": "particles systems neighborlist torch_mliap_model",
    "Lens": "__call__ get set",
    "ParticleId": "",
    "Patch": "__call__",
    "PositionAndCell": "positions cell",
    "Potential": "__call__",
    "PotentialOut": "total_energies gradients hessians __add__ __mul__",
    "SystemId": "",
    "Table": "keys data",
    "TorchMliap": "cutoff wrapper compute_cell_gradients call from_module",
    "TorchMliapForward": "__call__",
    "TorchMliapInput": "parameters graph",
    "View": "__call__",
    "WithPatch": "data patch",
}
# Function → the flag that its overloads distinguish.
OVERLOADS = {
    "torch_mliap_model_fn": "compute_cell_gradients",
    "make_torch_mliap_potential": "compute_cell_gradients",
    "make_torch_mliap_from_state": "compute_position_and_cell_gradients",
}


def parameters(function):
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        found.append(name + default)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_documented_signature(name):
    assert parameters(getattr(mliap, name)) == FUNCTIONS[name].split()


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_documented_attributes(name):
    cls = getattr(mliap, name)
    known = {*dir(cls)}
    for base in cls.__mro__:
        known |= {*getattr(base, "__annotations__", {})}
    assert set(CLASSES[name].split()) <= known


def test_models_and_potentials_have_the_documented_signatures():
    assert parameters(mliap.TorchMliap.from_module)[:3] == [
        "module",
        "cutoff",
        "compute_cell_gradients=False",
    ]
    assert parameters(mliap.TorchMliap.call) == ["self", "input"]
    assert parameters(mliap.TorchMliapForward.__call__) == ["self", "input"]
    assert parameters(mliap.Potential.__call__) == ["self", "state", "patch=None"]
    assert isinstance(mliap.EMPTY, mliap.EmptyType)
    assert torchcall.TorchModuleWrapper


@pytest.mark.parametrize("name", OVERLOADS)
def test_the_flag_determines_the_type_of_the_gradients(name):
    """False, the default: arrays. True: `PositionAndCell`."""
    found = {}
    for overload in typing.get_overloads(getattr(mliap, name)):
        assert [p.split("=")[0] for p in parameters(overload)] == [
            p.split("=")[0] for p in FUNCTIONS[name].split()
        ]
        signature = inspect.signature(overload)
        flag = signature.parameters[OVERLOADS[name]]
        found[flag.annotation] = str(signature.return_annotation)
        assert (flag.default is flag.empty) == (flag.annotation == "Literal[True]")
    assert set(found) == {"Literal[False]", "Literal[True]"}
    assert "PositionAndCell, EmptyType" in found["Literal[True]"]
    assert "Array, EmptyType" in found["Literal[False]"]
    result = "WithPatch[PotentialOut[" if name == "torch_mliap_model_fn" else "Potential["
    assert all(text.startswith(result) for text in found.values())


@pytest.mark.parametrize("flag, gradients", [("False", "Array"), ("True", "PositionAndCell")])
def test_views_and_lenses_are_annotated(flag, gradients):
    (overload,) = [
        f
        for f in typing.get_overloads(mliap.make_torch_mliap_potential)
        if inspect.signature(f).parameters["compute_cell_gradients"].annotation
        == f"Literal[{flag}]"
    ]
    output = f"State, PotentialOut[{gradients}, EmptyType]"
    found = {k: p.annotation for k, p in inspect.signature(overload).parameters.items()}
    del found["compute_cell_gradients"]
    assert found == {
        "particles_view": "View[State, Table[ParticleId, P]]",
        "systems_view": "View[State, Table[SystemId, S]]",
        "neighborlist_view": "View[State, NNList]",
        "model": "View[State, TorchMliap] | TorchMliap",
        "cutoffs_view": "View[State, Table[SystemId, Array]]",
        "patch_idx_view": f"View[{output}] | None",
        "out_cache_lens": f"Lens[{output}] | None",
    }
    result = f"Potential[State, {gradients}, EmptyType, Patch[State]]"
    assert inspect.signature(overload).return_annotation == result


def test_protocols_inherit_from_each_other():
    bases = mliap.IsTorchMliapParticles.__mro__
    assert mliap.IsRadiusGraphPoints in bases
    assert mliap.HasAtomicNumbers in bases
    assert all(cls._is_protocol for cls in (mliap.IsTorchMliapState, mliap.Lens, mliap.View))


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_public_names_are_documented(name):
    thing = getattr(mliap, name)
    text = inspect.getdoc(thing)
    assert name in mliap.__all__
    assert text
    if name in FUNCTIONS:
        assert "Args:" in text
        assert "Returns:" in text
        assert "Raises:" in text or name == "lattice_gradient_from_virial"


@pytest.mark.parametrize(
    "name",
    [*FUNCTIONS, *["Edges", "IsRadiusGraphPoints", "PositionAndCell", "PotentialOut", "HasCell"]],
)
def test_shapes_and_units_are_documented(name):
    text = inspect.getdoc(getattr(mliap, name))
    assert re.search(r"\((n|N|b|B|e|E), ", text) or name == "make_torch_mliap_from_state"
    assert re.search("eV|Å|cutoff", text) or name == "make_torch_mliap_from_state"
