"""Errors for wrong arguments, modules and operations; they name the argument and the remedy."""

import os

import numpy as np
import pytest
import reference
import torch
from energies import Soft, odd

import torchcall
from torchcall.mliap import AtomGraph, geometry_from_ase, neighbor_list


def error_of(module, path, example, **options):
    options = {"cutoff": reference.CUTOFF, "dynamic": False} | options
    with pytest.raises((TypeError, ValueError, OSError, RuntimeError)) as caught:
        torchcall.mliap.compile(module, path, example=example, **options)
    text = str(caught.value)
    assert text.startswith("torchcall: ")
    return text


OPTIONS = [
    ({"cutoff": 0.0}, "cutoff: expected a positive length in Å, got 0.0"),
    ({"cutoff": float("nan")}, "cutoff: expected a positive length in Å, got nan"),
    ({"cutoff": "5"}, "cutoff: expected a positive length in Å, got '5'"),
    ({"cutoff": None}, "cutoff: expected a positive length in Å, got None"),
    ({"dtype": "float16"}, "dtype: expected float32 or float64, got 'float16'"),
    ({"dtype": torch.int64}, "dtype: expected float32 or float64, got torch.int64"),
    ({"dtype": "nonsense"}, "dtype: expected float32 or float64, got 'nonsense'"),
    ({"device": "tpu"}, "device: expected 'cpu' or 'cuda', got 'tpu'"),
    ({"device": "meta"}, "device: expected 'cpu' or 'cuda', got 'meta'"),
    ({"dynamic": "yes"}, "dynamic: expected 'auto' or True or False, got 'yes'"),
    ({"dynamic": None}, "dynamic: expected 'auto' or True or False, got None"),
    ({"cache": "no"}, "cache: expected True or False, got 'no'"),
    ({"second_derivatives": 1}, "second_derivatives: expected True or False, got 1"),
]


@pytest.mark.parametrize("options, text", OPTIONS, ids=[str(o) for o, _ in OPTIONS])
def test_a_wrong_option_is_an_error(options, text, tmp_path, example):
    assert text in error_of(Soft(), tmp_path / "m.pt2", example, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_an_error(tmp_path, example):
    assert "torch cannot use here" in error_of(Soft(), tmp_path / "m.pt2", example, device="cuda")


PATHS = [
    pytest.param(lambda p: p, "got the directory", id="a directory"),
    pytest.param(lambda p: p / "m.pt", "a name that ends in .pt2", id="another ending"),
    pytest.param(lambda p: p / "no" / "m.pt2", "No such file or directory", id="no such folder"),
    pytest.param(lambda p: p / "file" / "m.pt2", "Not a directory", id="a file as a folder"),
    pytest.param(lambda p: str(p / "m\0.pt2"), "null", id="a null character"),
    pytest.param(lambda _: 3, "a str or a Path, got int", id="a number"),
]


@pytest.mark.parametrize("path, part", PATHS)
def test_a_path_that_cannot_be_written_is_an_error(path, part, tmp_path, example):
    (tmp_path / "file").touch()
    assert part in error_of(Soft(), path(tmp_path), example)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_an_error(tmp_path, example):
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_of(Soft(), tmp_path / "m.pt2", example)


def edited(key, change):
    def edit(graph):
        return graph | {key: change(graph[key].clone())}

    return edit


def put(value, *index):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


EXAMPLES = [
    (lambda _: None, "an AtomGraphInput (a dict), got NoneType"),
    (lambda g: list(g.values()), "an AtomGraphInput (a dict), got list"),
    (lambda g: {k: v for k, v in g.items() if k not in ("pos", "spin")}, "without 'pos', 'spin'"),
    (edited("pos", lambda t: t[:, :2]), "example['pos']: expected shape (9, 3), got (9, 2)"),
    (edited("batch", lambda t: t[:-1]), "example['batch']: expected shape (9,), got (8,)"),
    (edited("edge_index", lambda t: t.T), "example['edge_index']: expected shape"),
    (edited("cell", lambda t: t[:1]), "example['pbc']: expected shape (1, 3), got (2, 3)"),
    (edited("pos", lambda t: t.long()), "expected float32 or float64, got int64"),
    (edited("pos", lambda t: t.half()), "expected float32 or float64, got float16"),
    (edited("batch", lambda t: t.double()), "example['batch']: expected integers, got float64"),
    (edited("pbc", lambda t: t.int()), "example['pbc']: expected bool, got int32"),
    (edited("pos", lambda _: "abc"), "example['pos']: expected an array of numbers, got str"),
    (edited("pos", put(float("nan"), 0, 0)), "example['pos']: expected finite numbers"),
    (edited("cell", put(float("inf"), 0, 0, 0)), "example['cell']: expected finite numbers"),
    (edited("edge_index", put(9, 0, 0)), "example['edge_index']: expected numbers in [0, 9)"),
    (edited("edge_index", put(-1, 1, 0)), "expected numbers in [0, 9), got -1"),
    (edited("batch", put(5, 8)), "example['batch']: expected numbers in [0, 2), got 5"),
    (edited("batch", put(1, 0)), "example['batch']: expected nondecreasing systems"),
    (edited("cell_offsets", put(0.5, 0, 0)), "example['cell_offsets']: expected whole numbers"),
    (edited("atomic_numbers", put(0, 0)), "example['atomic_numbers']: expected numbers from 1 on"),
    (edited("cell_offsets", put(0.0, -1)), "expected edges between different atoms or images, got"),
]  # fmt: skip


@pytest.mark.parametrize("edit, text", EXAMPLES, ids=[text for _, text in EXAMPLES])
def test_a_wrong_example_is_an_error_that_names_the_key(edit, text, tmp_path, example):
    assert text in error_of(Soft(), tmp_path / "m.pt2", edit(example))


AXES = [("pos", "atoms"), ("edge_index", "edges"), ("cell", "systems")]


@pytest.mark.parametrize("key, what", AXES, ids=[what for _, what in AXES])
def test_an_example_below_the_minimum_is_an_error(key, what, tmp_path, example):
    from torchcall.mliap._compile._cases import resized

    small = resized(example, {"N": 2, "E": 2, "B": 2}, reference.CUTOFF)
    axes = {"pos": ("pos", "atomic_numbers", "batch"), "edge_index": ("cell_offsets",)}
    for name in axes.get(key, ("cell", "pbc", "charge", "spin")):
        small[name] = small[name][:1]
    if key == "edge_index":
        small[key] = small[key][:, :1]
    text = error_of(Soft(), tmp_path / "m.pt2", small)
    assert f"expected at least 2 {what}, phantoms included, got 1" in text


def test_a_graph_of_another_cutoff_is_an_error(tmp_path):
    import ase.build

    geometry = geometry_from_ase(ase.build.bulk("Si", cubic=True))
    neighbors = neighbor_list(3.0).allocate(*geometry)
    graph = AtomGraph.from_neighbors(
        neighbors, geometry.positions, geometry.cell, np.full(8, 14, np.int32)
    )
    text = error_of(Soft(), tmp_path / "m.pt2", graph, cutoff=4.0)
    assert "expected that of the example's neighbour list, 3 Å, got 4 Å" in text


MODULES = [
    (Soft, "an eager torch.nn.Module, got the class Soft"),
    (lambda x: x, "an eager torch.nn.Module, got function"),
    ("m.pt", "an eager torch.nn.Module, got str"),
]


@pytest.mark.parametrize("module, text", MODULES, ids=["a class", "a function", "a path"])
def test_an_object_that_is_not_a_module_is_an_error(module, text, tmp_path, example):
    assert text in error_of(module, tmp_path / "m.pt2", example)


def test_a_scripted_module_is_an_error_that_names_the_alternatives(tmp_path, example):
    module = torch.jit.script(reference.potentials()["Lennard-Jones"])
    text = error_of(module, tmp_path / "m.pt2", example)
    assert "pass the module that it was scripted from" in text


def fails(input, energy):
    del input, energy
    raise KeyError("charges")


def detaches_the_energy(input, _):
    pos = input["pos"].requires_grad_(True)
    energy = Soft()(input | {"pos": pos})
    (gradient,) = torch.autograd.grad(energy.sum(), pos)
    return {"energy": energy, "forces": -gradient}


RESULTS = [
    (lambda _, e: e.sum(), "output ['energy']: expected shape (2,), got ()"),
    (lambda _, e: {"e": e}, "output ['energy']: expected this key, got ['e']"),
    (lambda *_: None, "output ['energy']: expected a tensor, got None"),
    (
        lambda _, e: e.detach(),
        "output ['energy']: expected an energy that autograd can differentiate by 'pos'",
    ),
    (lambda _, e: e > 0, "output ['energy']: expected floats, got bool"),
    (lambda _, e: e * float("nan"), "output ['energy']: expected finite numbers for the example"),
    (lambda i, _: {"position_gradients": i["pos"]}, "['energy']: expected this key"),
    (
        lambda i, e: {"energy": e, "position_gradients": i["pos"][:1]},
        "output ['position_gradients']: expected shape (9, 3), got (1, 3)",
    ),
    (
        lambda i, e: {"energy": e, "position_gradients": i["pos"], "cell_gradients": None},
        "output ['cell_gradients']: expected a tensor, got None",
    ),
    (fails, "got one that fails on the example.\nKeyError: 'charges'"),
    (detaches_the_energy, "must return 'position_gradients' = -forces"),
]


@pytest.mark.parametrize("function, text", RESULTS, ids=[text for _, text in RESULTS])
def test_a_wrong_result_is_an_error_that_names_the_output(function, text, tmp_path, example):
    assert text in error_of(odd(function), tmp_path / "m.pt2", example)


def test_weights_of_another_precision_are_an_error_that_names_the_option(tmp_path, example):
    module = odd(lambda i, e: e * torch.nn.functional.linear(i["pos"][:2, :1], i["w"])[:, 0])
    module.linear = torch.nn.Linear(1, 1)
    type(module).forward = lambda self, i: self.linear(i["pos"][:2, :1])[:, 0]
    text = error_of(module, tmp_path / "m.pt2", example)
    assert "dtype='float64' casts the weights" in text


class _Uncopyable(Soft):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.parameter.UninitializedParameter()


def test_a_module_that_cannot_be_copied_is_an_error(tmp_path, example):
    assert "expected a module that can be copied" in error_of(
        _Uncopyable(), tmp_path / "m.pt2", example
    )


OPERATIONS = [
    (
        lambda i, e: e * (2.0 if float(i["pos"].sum()) > 0 else 1.0),
        "torch.Tensor.__float__",
        "test_compile_errors.py",
    ),
    (
        lambda i, e: e + torch.from_numpy(0 * i["pos"].detach().numpy()).sum(),
        "torch.Tensor.numpy",
        "test_compile_errors.py",
    ),
]


@pytest.mark.parametrize("dynamic", [False, "auto"], ids=["static", "auto"])
@pytest.mark.parametrize(
    "function, operation, place", OPERATIONS, ids=[o for _, o, _ in OPERATIONS]
)
def test_an_operation_that_cannot_be_exported_is_named(
    function, operation, place, dynamic, tmp_path, example
):
    text = error_of(odd(function), tmp_path / "m.pt2", example, dynamic=dynamic)
    assert "the module cannot be traced" in text
    assert f"operation {operation}, at {place}:" in text
    assert "Use the module without compilation: as torch.jit.script(module)" in text


def test_a_model_that_draws_random_numbers_is_an_error(tmp_path, example):
    text = error_of(odd(lambda _, e: e * torch.rand_like(e)), tmp_path / "m.pt2", example)
    assert "expected the module's results, got different ones" in text
    assert "random numbers" in text


def test_a_missing_compiler_is_an_error_that_names_cxx(tmp_path, example):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with config.patch({"cpp.cxx": ("no-such-compiler",)}):
            text = error_of(Soft(), tmp_path / "m.pt2", example, cache=False, dynamic=False)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert "expected a C++ compiler (g++" in text
    assert "CXX" in text
    assert list(tmp_path.iterdir()) == []
