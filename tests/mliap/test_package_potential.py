"""`TorchMliap.from_package`: inputs are checked against the package's metadata."""

import pickle
import re
import shutil
from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import changed, package  # noqa: F401
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall
from torchcall.mliap import TorchMliap, energy, pad_graph

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def graph():
    return graphs.atom_graph([reference.systems()["slab"]], slots=2)


@pytest.fixture
def padded(graph):
    return pad_graph(graph, cutoff=CUTOFF)[0]


def error_of(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        jax.block_until_ready(call())
    assert "torchcall: Energy (" in str(caught.value) or "torchcall: /" in str(caught.value)
    assert "frame #" not in str(caught.value)
    return str(caught.value)


def test_cutoff_dtypes_and_outputs_come_from_the_package(package):  # noqa: F811
    model = TorchMliap.from_package(package)
    assert float(model.cutoff.data[0]) == CUTOFF
    assert model.compute_cell_gradients
    assert model.capacity is None
    with pytest.raises(TypeError, match="from_package: input_spec is fixed for potentials"):
        TorchMliap.from_package(package, input_spec=None)
    with pytest.raises(ValueError, match="narrow: expected 'auto' or False"):
        TorchMliap.from_package(package, narrow=True)


def test_a_list_of_another_cutoff_is_refused(package, graph):  # noqa: F811
    model = TorchMliap.from_package(package)
    short = replace(graph, list_cutoff=3.0)
    with pytest.raises(ValueError, match="expected a neighbour list with the model's cutoff"):
        energy(model, short)


def test_inputs_are_padded_to_the_capacity_and_exceeding_it_names_the_axis(
    package,  # noqa: F811
    graph,
    tmp_path,
):
    n, e = len(graph.positions), graph.edge_index.shape[1]
    capacity = {"N": n + 4, "E": e + 10, "B": 3}
    static = changed(package, tmp_path / "static.pt2", capacity=capacity)
    model = TorchMliap.from_package(static)
    assert model.capacity == (n + 4, e + 10, 3)
    expected = energy(TorchMliap.from_package(package), graph)
    np.testing.assert_allclose(energy(model, graph), expected, rtol=1e-12)
    for axis, few in (("N", n), ("E", e - 5), ("B", 1)):
        small = changed(package, tmp_path / f"{axis}.pt2", capacity=capacity | {axis: few})
        word = {"N": "atoms", "E": "edges", "B": "systems"}[axis]
        with pytest.raises(ValueError, match=f"n_{word}"):
            energy(TorchMliap.from_package(small), graph)
    # The wrapper checks the capacity, too.
    exact = pad_graph(graph, cutoff=CUTOFF)[0]
    assert f"with N = {n + 4}, the capacity that the package was compiled for" in error_of(
        lambda: model.call(exact)
    )


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda g: {"pos": g["pos"].astype(jnp.float32)}, "expected float64 (N, 3), got float32"),
        (lambda g: {"edge_index": g["edge_index"].astype(jnp.int32)}, "expected int64 (2, E)"),
        (lambda g: {"pos": g["pos"][:, :2]}, "expected float64 (N, 3), got float64 (9, 2)"),
        (lambda g: {"pos": g["pos"].reshape(-1)}, "expected float64 (N, 3), got float64 (27,)"),
        (lambda g: {"batch": g["batch"][:-1]}, "got int64 (8,)"),
        (lambda g: {"cell_offsets": g["cell_offsets"][:-1]}, "with E = "),
        (lambda g: {"charge": g["charge"][:1]}, "with B >= 2"),
        (lambda _: {"spin": None}, "['spin']: expected an array, got None"),
    ],
    ids=[
        "single precision",
        "32-bit indices",
        "two coordinates",
        "flat positions",
        "one atom too few",
        "one edge too few",
        "no phantom system",
        "None for spin",
    ],
)
def test_another_shape_or_dtype_is_an_error_at_trace_time(package, padded, change, expected):  # noqa: F811
    f = torchcall.load(package)
    index = ("edge_index", "batch", "atomic_numbers")
    right = padded | {key: padded[key].astype(jnp.int64) for key in index}
    f(right)
    before = f.stats()["calls"]
    assert expected in error_of(lambda: f(right | change(right)))
    assert f.stats()["calls"] == before


def test_other_keys_are_an_error(package, padded):  # noqa: F811
    f = torchcall.load(package)
    fewer = {key: value for key, value in padded.items() if key != "spin"}
    assert "expected the keys ['atomic_numbers'" in error_of(lambda: f(fewer))
    assert "got ['atomic_numbers'" in error_of(lambda: f(padded | {"more": padded["spin"]}))
    assert "operand args: expected 1 entries" in error_of(lambda: f(padded, padded))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("edge_index", 9, "['edge_index']: expected indices from 0 to 8, got 9 at entry 3"),
        ("edge_index", -1, "['edge_index']: expected indices from 0 to 8, got -1 at entry 3"),
        ("edge_index", 10**15, "got 1000000000000000 at entry 3"),
        ("batch", 2, "['batch']: expected indices from 0 to 1, got 2 at entry 3"),
        ("atomic_numbers", 8, "['atomic_numbers']: expected one of 6, 14, got 8 at entry 3"),
        ("atomic_numbers", -6, "['atomic_numbers']: expected one of 6, 14, got -6 at entry 3"),
        ("atomic_numbers", 500, "['atomic_numbers']: expected one of 6, 14, got 500 at entry 3"),
    ],
)
def test_an_index_out_of_range_is_an_error_and_later_calls_work(
    package,  # noqa: F811
    padded,
    key,
    value,
    message,
):
    model = TorchMliap.from_package(package)
    wrong = padded[key].astype(jnp.int64)
    wrong = wrong.at[(0, 3) if wrong.ndim == 2 else 3].set(value)
    assert message in error_of(lambda: model.call(padded | {key: wrong}))
    assert np.isfinite(model.call(padded)["energy"]).all()


def test_float_outputs_are_not_cast_silently_in_a_generic_wrapper(package, padded):  # noqa: F811
    index = ("edge_index", "batch", "atomic_numbers")
    right = padded | {key: padded[key].astype(jnp.int64) for key in index}
    out = torchcall.load(package)(right)
    assert sorted(out) == ["cell_gradients", "energy", "position_gradients"]
    assert out["energy"].dtype == jnp.float64


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"torch": "2.5.1"}, "expected a package compiled for torch 2"),
        pytest.param(
            {"AOTI_DEVICE_KEY": "cuda"},
            "a device that torch can use here, got one for cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        ({"AOTI_DEVICE_KEY": "xpu"}, "cpu or cuda, got one for xpu"),
        ({"AOTI_MACHINE": "riscv"}, "got one for a machine riscv"),
        ({"format": 99}, "expected torchcall metadata of format 2, got 99"),
    ],
    ids=["torch", "a device torch lacks", "a device of another kind", "machine", "format"],
)
def test_a_package_for_another_torch_or_machine_is_refused(package, tmp_path, changes, message):  # noqa: F811
    path = changed(package, tmp_path / "elsewhere.pt2", **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        torchcall.load(path)
    assert str(path) in str(caught.value)


def test_a_package_with_instructions_that_the_processor_lacks_is_refused(
    package,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    path = changed(package, tmp_path / "amx.pt2", AOTI_CPU_ISA="AVX2 AMX_TILE")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="got one for one with AMX_TILE, which this processor"):
        torchcall.load(path)


def test_damaged_packages_are_refused(package, tmp_path):  # noqa: F811
    whole = package.read_bytes()
    path = tmp_path / "damaged.pt2"
    for content in (b"", whole[: len(whole) // 2], whole[:-2000], b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.pt2"):
            torchcall.load(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"damaged\.pt2.*damaged"):
        torchcall.load(path)
    with pytest.raises(FileNotFoundError):
        torchcall.load(tmp_path / "missing.pt2")


def test_refresh_reloads_a_package(package, padded, tmp_path):  # noqa: F811
    path = tmp_path / "model.pt2"
    shutil.copy(package, path)
    model = TorchMliap.from_package(path)
    before = model.call(padded)["energy"]
    shutil.copy(package, path)
    model.wrapper.refresh()
    np.testing.assert_array_equal(model.call(padded)["energy"], before)
    changed(package, path, cutoff=1.0)
    with pytest.raises(ValueError, match="refresh: expected a package with the same arguments"):
        model.wrapper.refresh()
    path.unlink()
    np.testing.assert_array_equal(model.call(padded)["energy"], before)


def test_a_wrapper_of_a_package_pickles_by_its_path(package, padded):  # noqa: F811
    model = TorchMliap.from_package(package)
    copy = pickle.loads(pickle.dumps(model.wrapper))
    again = TorchMliap(model.cutoff, copy, True)
    np.testing.assert_array_equal(again.call(padded)["energy"], model.call(padded)["energy"])


def test_options_of_other_engines_are_refused(package):  # noqa: F811
    with pytest.raises(ValueError, match="freeze=True: expected a TorchScript module"):
        torchcall.load(package, freeze=True)
