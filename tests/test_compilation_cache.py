"""The cache of compiled programs that the command line uses."""

import os

import jax
import pytest
from models import run_python

from torchcall._compilation_cache import use_compilation_cache

NAMES = [
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_compilation_cache_max_size",
]


@pytest.fixture
def unset(monkeypatch):
    """JAX without the settings of the test run."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("unset")
def test_programs_are_stored_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHCALL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "7")
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 7)
    folder = tmp_path / "torchcall" / "programs"
    assert use_compilation_cache() == folder
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == 7


@pytest.mark.usefixtures("unset")
def test_the_users_folder_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unset")
def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "file"))
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


TWO_MODELS = """
    import jax, numpy as np, torch, torchcall
    from models import Scale
    from torchcall._compilation_cache import use_compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    assert use_compilation_cache() is not None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    factors = {factors}
    scripts = {{factor: torch.jit.script(Scale(factor)) for factor in factors}}
    models = {{factor: torchcall.TorchModuleWrapper(scripts[factor]) for factor in factors}}
    x = np.ones(3, np.float32)
    for factor, f in models.items():
        np.testing.assert_array_equal(jax.jit(lambda x: f(x) + 1)(x), factor * x + 1)
    first, second = models.values()
    both = jax.jit(lambda x: first(x) - 3 * second(x))(x)
    np.testing.assert_array_equal(both, factors[0] * x - 3 * factors[1] * x)
"""

PROGRAM = """
    import sys
    import jax, numpy as np, torch, torchcall
    from models import Scale
    from torchcall._compilation_cache import use_compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    assert use_compilation_cache() is not None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    factor, where = {factor}, {where!r}
    model = torch.jit.script(Scale(factor))
    if where == "file":
        model.save("model.pt")
        model = "model.pt"
    f = torchcall.TorchModuleWrapper(model)
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: f(x) + 1)(x), factor * x + 1)
    print(sum(hits))
"""


@pytest.mark.parametrize("where", ["file", "live"])
def test_a_stored_program_calls_the_model_of_its_process(tmp_path, where):
    """A file of the same name with other weights is another program; live weights are shared."""
    hits = []
    for factor in (2.0, 2.0, 5.0):
        code = PROGRAM.format(factor=factor, where=where)
        done = run_python(tmp_path, code, TORCHCALL_CACHE=str(tmp_path / "cache"))
        hits.append(int(done.stdout))
    assert hits == ([0, 1, 0] if where == "file" else [0, 1, 1])
    assert os.listdir(tmp_path / "cache" / "programs")


def test_stored_programs_of_live_models_follow_the_order_in_which_they_are_made(tmp_path):
    for factors in ((2.0, 5.0), (5.0, 2.0)):
        code = TWO_MODELS.format(factors=factors)
        run_python(tmp_path, code, TORCHCALL_CACHE=str(tmp_path / "cache"))
