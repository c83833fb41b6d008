"""Traced graphs return the modules' results for all shapes; code that fixes a shape is found."""

import pytest
import reference
import torch
from energies import Energies, Pairs, Soft, odd

from torchcall._compile._build import content_of
from torchcall._compile._compare import DifferentError
from torchcall._compile._errors import CompileError, SpecialisedError
from torchcall._engines.fake_scripts import traceable_scripts
from torchcall.mliap._compile._cases import dynamic_cases, resized, static_cases
from torchcall.mliap._compile._form import B, E, N, sizes_of
from torchcall.mliap._compile._gradients import PotentialModule
from torchcall.mliap._compile._references import References, graph_function
from torchcall.mliap._compile._run import _of_distinct_sizes
from torchcall.mliap._compile._trace import program_of, trace

CPU = torch.device("cpu")
CUTOFF = reference.CUTOFF


def modules():
    found = {f"{name}, differentiating": m for name, m in reference.potentials().items()}
    lj = reference.example("lennard_jones").LennardJones
    found["Lennard-Jones by autograd"] = lj(**reference.LJ, cell_gradients=True, autograd=True)
    found["Lennard-Jones, energy only"] = Pairs()
    for name in ("Stillinger-Weber", "message passing"):
        found[f"{name}, energy only"] = Energies(reference.potentials()[name])
    return found


def traced(module, example, *, dynamic=True):
    potential = PotentialModule(module, None, CPU)
    potential.inspect(example)
    graph = _of_distinct_sizes(example) if dynamic else example
    with torch.enable_grad():
        return potential, graph, trace(potential, graph, dynamic=dynamic)


@pytest.mark.parametrize("name", list(modules()))
def test_the_examples_can_be_traced_for_any_shapes(name, example):
    potential, graph, found = traced(modules()[name], example)
    references = References(potential, dynamic_cases(example, CUTOFF))
    references.compare(graph_function(found.module, potential.outputs()))
    references.compare(program_of(found, graph, potential.outputs()))


class ScaledSlices(torch.nn.Module):
    """One weight in `addcmul`; slices that begin with a whole axis, and one up to a symbol."""

    cutoff = CUTOFF

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64), False)

    def forward(self, input):
        sender, receiver = input["edge_index"]
        shift = input["cell_offsets"].unsqueeze(1) @ input["cell"][input["batch"][sender]]
        r = input["pos"][receiver] - input["pos"][sender] + shift.squeeze(1)
        pairs = torch.exp(-(r[:, :2] ** 2).sum(1)) + torch.exp(-(r[:, 2] ** 2))
        atoms = torch.zeros_like(input["pos"][:, 0]).index_add(0, sender, pairs)
        atoms = torch.addcmul(input["charge"][input["batch"]], self.scale, atoms)
        atoms = torch.cat([atoms, atoms])[: input["pos"].size(0)]
        return torch.zeros_like(input["charge"]).index_add(0, input["batch"], atoms)


def test_operators_whose_shape_functions_fail_are_replaced(example):
    potential, _, found = traced(ScaledSlices(), example)
    called = {str(node.target) for node in found.module.graph.nodes}
    assert not called & {"aten.addcmul.default", "aten.slice_backward.default"}
    whole = [
        node
        for node in found.module.graph.nodes
        if str(node.target) == "aten.slice_scatter.default" and node.args[4] == 2**63 - 1
    ]
    assert not whole
    references = References(potential, dynamic_cases(example, CUTOFF))
    references.compare(graph_function(found.module, potential.outputs()))


def test_cases_differ_in_shape_and_reach_the_minimum(example):
    graphs = [case.graph for case in dynamic_cases(example, CUTOFF)]
    assert len({tuple(sizes_of(graph).values()) for graph in graphs}) >= 5
    assert {N: 2, E: 2, B: 2} in [sizes_of(graph) for graph in graphs]
    for graph in graphs:
        assert int(graph["edge_index"].max()) < sizes_of(graph)[N]
        assert (graph["batch"][1:] >= graph["batch"][:-1]).all()
        assert int(graph["batch"].max()) < sizes_of(graph)[B]
    for case in static_cases(example, CUTOFF):
        assert sizes_of(case.graph) == sizes_of(example)


def test_phantoms_of_resized_graphs_do_not_change_results(example):
    larger = {name: size + 5 for name, size in sizes_of(example).items()}
    module = reference.potentials()["message passing"]
    expected, found = module(example), module(resized(example, larger, CUTOFF))
    torch.testing.assert_close(found["energy"][0], expected["energy"][0])
    torch.testing.assert_close(
        found["position_gradients"][:8], expected["position_gradients"][:8]
    )  # fmt: skip
    assert not found["position_gradients"][8:].any()


def test_a_branch_for_one_size_is_compared_at_that_size(example):
    def right(input, energy):
        return energy + 0.0 if input["pos"].size(0) == 31 else energy

    def wrong(input, energy):
        return 2.0 * energy if input["pos"].size(0) == 31 else energy

    for function in (right, wrong):
        _, _, found = traced(odd(function), example)
        assert found.excluded == [{N: 31}]


SPECIALISED = [
    (lambda i, e: e * (2.0 if i["pos"].size(0) > 500 else 1.0), "N > 500|N <= 500"),
    (lambda i, e: e * int(i["cell"].size(0)), "systems became the constant"),
    (lambda i, e: e * (1.0 if i["edge_index"].size(1) % 2 else 2.0), "Mod(E, 2)"),
]


@pytest.mark.parametrize(
    "function, part", SPECIALISED, ids=["a range", "a Python int", "a remainder"]
)
def test_code_that_fixes_a_size_is_an_error_that_names_its_line(function, part, example):
    with pytest.raises(SpecialisedError) as caught:
        traced(odd(function), example)
    assert any(p in str(caught.value) for p in part.split("|"))
    assert "test_tracing.py" in str(caught.value)


@torch.jit.script
def _scripted_scale(x: torch.Tensor) -> torch.Tensor:
    return x * x.size(0) / x.size(0)


def test_script_functions_do_not_fix_sizes(example):
    before = torch.jit.ScriptFunction.__call__
    _, _, found = traced(odd(lambda _, energy: _scripted_scale(energy)), example)
    assert found.excluded == []
    assert torch.jit.ScriptFunction.__call__ is before


def test_script_functions_of_other_threads_do_not_change():
    import threading

    results = []
    with traceable_scripts(inline_functions=True):
        work = threading.Thread(target=lambda: results.append(_scripted_scale(torch.ones(2))))
        work.start()
        work.join()
    assert torch.equal(results[0], torch.ones(2))


def test_scripted_submodules_that_fix_sizes_are_named(example):
    module = odd(lambda _, energy: energy)
    module.head = torch.jit.script(Flattened())
    head = type(module).forward
    type(module).forward = lambda self, input: self.head(head(self, input))
    with pytest.raises(SpecialisedError) as caught:
        traced(module, example)
    assert "parts in TorchScript (head)" in str(caught.value)


class Flattened(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x.reshape([x.size(0)])


def test_the_content_hash_depends_on_operators_and_weights(example):
    def content(module):
        return content_of(traced(module, example)[2].module)

    same, module = content(Soft()), Soft()
    assert content(module) == same
    with torch.no_grad():
        module.weight.add_(1e-9)
    assert content(module) != same
    assert content(odd(lambda _, energy: energy * 1.0001)) != content(odd(lambda _, e: e * 1.0002))


def test_a_different_result_is_an_error_that_names_the_case(example):
    potential, _, found = traced(Soft(), example)
    references = References(potential, dynamic_cases(example, CUTOFF))
    right = graph_function(found.module, potential.outputs())

    def wrong(graph):
        out = right(graph)
        if len(graph["pos"]) == 2:
            out["energy"] = out["energy"] + 1e-6
        return out

    references.compare(right)
    with pytest.raises(DifferentError, match=r"\['energy'\] for two of everything"):
        references.compare(wrong)
    with pytest.raises(DifferentError, match=r"expected the module\'s float64 \(2,\), got"):
        references.compare(lambda graph: right(graph) | {"energy": torch.zeros(1)})


class Overwriting(torch.nn.Module):
    """Writes to the charges of all graphs but those of the example's size."""

    cutoff = CUTOFF

    def forward(self, input):
        pos = input["pos"]
        if pos.shape[0] != 9:
            input["charge"][0] *= 2
        sums = pos.square().sum(1)
        return torch.zeros_like(input["charge"]).index_add(0, input["batch"], sums)


def test_a_trace_that_writes_to_its_input_is_an_error(example):
    assert example["pos"].shape[0] == 9
    with pytest.raises(CompileError, match="writes to charge for some shapes only; give it copies"):
        traced(Overwriting(), example)
