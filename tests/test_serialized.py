"""Programs that outlive their process name their model by code and weights."""

import pickle

import jax
import numpy as np
import pytest
import torch
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from models import Scale, assert_same, double, error_of, run_python

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.ones(3, np.float32)

TWINS = """
    import pickle
    from pathlib import Path
    import jax, numpy as np, torch, torchcall
    from jax.experimental.serialize_executable import serialize, deserialize_and_load
    from models import Scale

    x = np.ones(3, np.float32)
    factors = {factors}
    def wrap(factor):
        if {freeze}:
            return torchcall.TorchModuleWrapper(torch.jit.script(Scale(factor).eval()), freeze=True)
        path = Path(str(factor)) / "model.pt"  # files of one name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            torch.jit.script(Scale(factor)).save(path)
        return torchcall.TorchModuleWrapper(path)
    wrappers = {{factor: wrap(factor) for factor in factors}}
    for factor, f in wrappers.items():
        np.testing.assert_array_equal(f(x), factor * x)
    jax.config.update("jax_compilation_cache_dir", "cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    programs = {{s: jax.jit(lambda x: f(x) + 1).lower(x).compile() for s, f in wrappers.items()}}
    for factor, program in programs.items():
        np.testing.assert_array_equal(program(x), factor * x + 1)
    if not Path("programs").exists():
        Path("programs").write_bytes(pickle.dumps({{s: serialize(p) for s, p in programs.items()}}))
    for factor, saved in pickle.loads(Path("programs").read_bytes()).items():
        np.testing.assert_array_equal(deserialize_and_load(*saved)(x), factor * x + 1)
    print("right")
"""


@pytest.mark.parametrize(
    "freeze",
    [
        pytest.param(False, id="files"),
        pytest.param(True, id="frozen modules", marks=pytest.mark.slow),
    ],
)
def test_programs_find_their_own_weights_in_a_process_of_another_order(tmp_path, freeze):
    for factors in ((2.0, 10.0), (7.0, 10.0, 2.0)):
        fresh = len(factors) == 3
        done = run_python(tmp_path, TWINS.format(freeze=freeze, factors=factors), fresh=fresh)
        assert done.stdout == "right\n"


@pytest.mark.parametrize(
    "model, instead",
    [
        (torch.jit.script(double), "freeze=True"),
        (double, "torchcall.compile"),
        (torch.jit.script(Scale(2.0)), "freeze=True"),
    ],
    ids=["function", "eager", "module"],
)
def test_a_program_over_live_weights_is_not_serialised(model, instead):
    compiled = jax.jit(TorchModuleWrapper(model)).lower(X).compile()
    text = error_of(lambda: serialize(compiled))
    assert text.startswith("torchcall: ")
    assert "to a file" in text
    assert instead in text
    assert_same(compiled(X), 2 * X)


def test_a_program_is_not_serialised_or_loaded_after_its_weights_were_replaced(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Scale(2.0)).save(path)
    f = TorchModuleWrapper(path)
    program = jax.jit(f)
    compiled = program.lower(X).compile()
    saved = serialize(compiled)
    f.refresh()  # the same weights
    assert_same(deserialize_and_load(*saved)(X), 2 * X)
    torch.jit.script(Scale(3.0)).save(path)
    f.refresh()
    assert_same(compiled(X), 3 * X)
    assert "refresh()" in error_of(lambda: serialize(compiled))
    assert "torchcall: " in error_of(lambda: deserialize_and_load(*saved)(X))
    again = jax.jit(lambda x: program(x) + 1).lower(X).compile()
    assert_same(deserialize_and_load(*serialize(again))(X), 3 * X + 1)


def test_a_frozen_model_does_not_see_weights_that_change_in_place():
    module = torch.jit.script(Scale(2.0).eval())
    f = TorchModuleWrapper(module, freeze=True)
    with torch.no_grad():
        module.factor.fill_(5.0)
    assert_same(f(X), 2 * X)


def test_a_loaded_program_without_its_model_is_an_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Scale(2.0)).save(path)
    saved = pickle.dumps(serialize(jax.jit(TorchModuleWrapper(path)).lower(X).compile()))
    jax.clear_caches()
    text = error_of(lambda: deserialize_and_load(*pickle.loads(saved))(X))
    assert "torchcall: " in text
    assert "call the wrapper once" in text
