"""The example programs of potentials, and their physics."""

import numpy as np
import pytest
import reference
from reference import one_thread  # noqa: F401

from torchcall.mliap import HyperGraph, TorchMliapInput, torch_mliap_model_fn


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example's `main`. Returns its result and its last line of output."""
    monkeypatch.syspath_prepend(str(reference.EXAMPLES))

    def main(name, *arguments):
        found = reference.example(name).main(list(arguments))
        return found, capsys.readouterr().out.strip().splitlines()[-1]

    return main


def test_each_silicon_cell_has_its_thermostats_temperature(run):
    """Mean kinetic temperature of 192 degrees of freedom over 40 relaxation times."""
    found, line = run("nvt_silicon", "--steps", "1500", "--temperatures", "300", "900")
    np.testing.assert_allclose(found["temperatures"], [300.0, 900.0], rtol=0.06)
    # Equipartition of a nearly harmonic crystal: potential energy rises by 3/2 k per atom.
    assert 0.05 < np.diff(found["energies"])[0] < 0.11
    assert found["calls"] == 1500
    assert line.startswith("2 cells of 64 atoms, 1500 steps: ")


def test_the_relaxed_cell_has_no_stress(run):
    """The potential's known crystal: a = 5.431 Å, −2 ε per atom."""
    found, line = run("relax_cell")
    assert abs(found["first stress"]).max() > 0.05
    assert abs(found["stress"]).max() < 1e-9
    assert found["force"] < 1e-9
    np.testing.assert_allclose(found["energy"], -2 * 2.1683, rtol=1e-4)
    cell = found["cell"]
    np.testing.assert_allclose(cell @ cell.T, 5.431**2 * np.eye(3), rtol=0, atol=5e-3)
    assert found["calls"] == found["steps"]
    assert "a = 5.43" in line


@pytest.mark.slow
def test_monte_carlo_evaluates_once_per_step_and_its_cache_is_right(run):
    found, line = run("monte_carlo", "--steps", "400", "--cells", "2")
    assert found["calls"] == 401
    assert found["cached"]
    assert 0.2 < found["rate"] < 0.9
    assert "401 evaluations" in line
    state, model = found["state"], found["model"]
    fresh = torch_mliap_model_fn(
        TorchMliapInput(
            model,
            HyperGraph(
                state.particles,
                state.systems,
                state.neighborlist(state.particles, state.systems, model.cutoff),
            ),
        )
    ).data
    np.testing.assert_allclose(
        state.output.total_energies.data, fresh.total_energies.data, rtol=1e-5
    )
    np.testing.assert_allclose(state.output.gradients, fresh.gradients, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_phonons_of_silicon_at_gamma(run, x64):
    """Three acoustic modes at rest, and the optical modes of Stillinger-Weber silicon."""
    del x64
    found, line = run("phonons", "--repeat", "1")
    np.testing.assert_allclose(found["frequencies"][:3], 0, atol=1e-4)
    np.testing.assert_allclose(found["frequencies"][-3:], 17.83, rtol=1e-3)
    np.testing.assert_allclose(found["differences"], found["exact"], rtol=0, atol=1e-5)
    assert line.startswith("48 finite-difference forces")
