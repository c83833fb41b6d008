"""The MACE of `examples/mace_adapter.py`: conventions, and tracing for any shapes."""

import pytest
import reference
import torch

from torchcall.mliap import with_gradients

pytest.importorskip("mace", reason="mace-torch is not installed")

pytestmark = [
    pytest.mark.slow,
    # mace-torch and e3nn use what torch and numpy have deprecated.
    pytest.mark.filterwarnings("ignore"),
]
CUTOFF = 5.0


@pytest.fixture(scope="module")
def adapter():
    return reference.example("mace_adapter")


@pytest.fixture(scope="module")
def model(adapter):
    return adapter.random_mace(for_compile=True).double()


def silicon(*kinds, **options):
    members = [reference.systems()[kind] for kind in kinds]
    for member in members:
        member.numbers[:] = 14
    return reference.graph(members, reach=CUTOFF, **options)


def test_energies_and_forces_equal_those_of_mace(adapter, model):
    graph = silicon("triclinic")
    n, e = 8, graph["cell_offsets"].shape[0] - 3
    index, offsets = graph["edge_index"][:, :e], graph["cell_offsets"][:e]
    data = {
        "positions": graph["pos"][:n],
        "node_attrs": torch.ones(n, 1, dtype=torch.float64),
        "edge_index": index,
        "shifts": offsets @ graph["cell"][0],
        "unit_shifts": offsets,
        "cell": graph["cell"][0],
        "batch": torch.zeros(n, dtype=torch.int64),
        "ptr": torch.tensor([0, n]),
    }
    expected = model(data, compute_force=True, compute_stress=False)
    out = with_gradients(adapter.MaceEnergy(model))(graph)
    torch.testing.assert_close(out["energy"][:1], expected["energy"])
    torch.testing.assert_close(out["position_gradients"][:n], -expected["forces"])


def test_mace_is_traced_for_any_shapes(adapter, model):
    from torchcall.mliap._compile._cases import dynamic_cases
    from torchcall.mliap._compile._gradients import PotentialModule
    from torchcall.mliap._compile._references import References, graph_function
    from torchcall.mliap._compile._run import _of_distinct_sizes
    from torchcall.mliap._compile._trace import trace
    from torchcall.mliap._species import species_of

    graph = silicon("triclinic", "slab")
    potential = PotentialModule(adapter.MaceEnergy(model), None, torch.device("cpu"))
    potential.inspect(graph)
    with torch.enable_grad():
        found = trace(potential, _of_distinct_sizes(graph), dynamic=True)
    assert found.excluded == []
    references = References(potential, dynamic_cases(graph, CUTOFF))
    references.compare(graph_function(found.module, potential.outputs()))
    assert species_of(potential.module) == (14,)


def test_scripted_and_eager_forms_agree(adapter):
    from e3nn.util import jit

    eager = with_gradients(adapter.MaceEnergy(adapter.random_mace(for_compile=False)))
    graph = silicon("triclinic", dtype=torch.float32)
    for key, value in jit.script(eager)(graph).items():
        torch.testing.assert_close(value, eager(graph)[key], rtol=1e-3, atol=1e-4)
