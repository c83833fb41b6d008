"""Model files that change while a process uses them: a program never gets weights by mistake."""

import os
import shutil

import jax
import numpy as np
import pytest
import torch
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from models import Scale, assert_same, error_of, run_python

import torchcall
from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.ones(3, np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Per kind: files with the factors 2 and 3."""
    folder = tmp_path_factory.mktemp("models")
    for factor in (2.0, 3.0):
        torch.jit.script(Scale(factor)).save(folder / f"{factor:.0f}.pt")
        path = folder / f"{factor:.0f}.pt2"
        torchcall.compile(Scale(factor), path, example=(X,), dynamic=False)
    return {kind: (folder / f"2.{kind}", folder / f"3.{kind}") for kind in ("pt", "pt2")}


@pytest.fixture(params=["pt", "pt2"], ids=["archive", "package"])
def model(request, files, tmp_path):
    """A file with the factor 2, and a function that replaces it by one with the factor 3."""
    two, three = files[request.param]
    path = tmp_path / two.name
    shutil.copyfile(two, path)

    def replace() -> None:
        shutil.copyfile(three, tmp_path / "new")
        os.replace(tmp_path / "new", path)

    return path, replace


def test_a_serialised_program_names_the_weights_of_its_file(model):
    path, replace = model
    f = TorchModuleWrapper(path)
    saved = serialize(jax.jit(f).lower(X).compile())
    assert_same(deserialize_and_load(*saved)(X), 2 * X)
    replace()
    other = TorchModuleWrapper(path)
    assert_same(other(X), 3 * X)
    assert_same(deserialize_and_load(*saved)(X), 2 * X)
    f.refresh()
    jax.clear_caches()
    text = error_of(lambda: deserialize_and_load(*saved)(X))
    assert "expected" in text
    assert "weights" in text


def test_a_program_compiled_after_its_file_was_replaced_is_not_serialised(model):
    path, replace = model
    f = TorchModuleWrapper(path)
    replace()
    program = jax.jit(lambda x: f(x) + 1)
    compiled = program.lower(X).compile()
    assert_same(compiled(X), 2 * X + 1)
    assert "got one that changed since; call refresh()" in error_of(lambda: serialize(compiled))
    f.refresh()
    assert_same(compiled(X), 3 * X + 1)
    assert_same(program(X), 3 * X + 1)
    again = jax.jit(lambda x: f(x) - 1).lower(X).compile()
    assert_same(deserialize_and_load(*serialize(again))(X), 3 * X - 1)


def test_a_removed_file_leaves_its_loaded_model_usable(model):
    path, _ = model
    f = TorchModuleWrapper(path)
    path.unlink()
    compiled = jax.jit(f).lower(X).compile()
    assert_same(compiled(X), 2 * X)
    assert "torchcall: " in error_of(lambda: serialize(compiled))


def test_a_file_that_changes_after_its_metadata_were_read_is_an_error(model, monkeypatch):
    path, replace = model
    name = "from_package" if path.suffix == ".pt2" else "from_file"
    load = getattr(torchcall._bridge.Model, name)

    def replace_and_load(*args):
        replace()
        return load(*args)

    class Model:
        pass

    setattr(Model, name, replace_and_load)
    monkeypatch.setattr(torchcall._bridge, "Model", Model)
    assert "changed while it was loaded" in error_of(lambda: TorchModuleWrapper(path))
    monkeypatch.undo()
    assert_same(TorchModuleWrapper(path)(X), 3 * X)


def test_a_link_is_followed_again_by_refresh(files, tmp_path):
    two, three = files["pt"]
    link = tmp_path / "latest.pt"
    link.symlink_to(two)
    f = TorchModuleWrapper(link)
    assert_same(f(X), 2 * X)
    link.unlink()
    link.symlink_to(three)
    f.refresh()
    assert_same(f(X), 3 * X)


PROCESS = """
    import pickle, sys
    from pathlib import Path
    import jax, numpy as np, torchcall
    from jax.experimental.serialize_executable import serialize, deserialize_and_load

    jax.config.update("jax_compilation_cache_dir", "cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    x = np.ones(3, np.float32)
    first, second = torchcall.load({first!r}), torchcall.load({second!r})
    np.testing.assert_array_equal(first(x), {a} * x)
    np.testing.assert_array_equal(second(x), {b} * x)
    for f, factor in ((second, {b}), (first, {a})):
        np.testing.assert_array_equal(jax.jit(lambda x: f(x) - 1)(x), factor * x - 1)
    if not Path("program").exists():
        program = serialize(jax.jit(lambda x: first(x) + 1).lower(x).compile())
        Path("program").write_bytes(pickle.dumps(program))
    saved = pickle.loads(Path("program").read_bytes())
    np.testing.assert_array_equal(deserialize_and_load(*saved)(x), 3 * x)
    print("right")
"""

WITHOUT = """
    import pickle
    from pathlib import Path
    import jax, numpy as np, torchcall
    from jax.experimental.serialize_executable import deserialize_and_load

    x = np.ones(3, np.float32)
    other = torchcall.load({other!r})
    other(x)
    try:
        deserialize_and_load(*pickle.loads(Path("program").read_bytes()))(x)
    except Exception as error:
        assert "torchcall: " in str(error), error
        assert "expected" in str(error), error
        print("refused")
"""


def test_a_program_over_a_package_finds_its_own_weights_in_another_process(files, tmp_path):
    two, three = map(str, files["pt2"])
    for first, second, a, b in ((two, three, 2, 3), (three, two, 3, 2)):
        code = PROCESS.format(first=first, second=second, a=a, b=b)
        assert run_python(tmp_path, code).stdout == "right\n"
    assert run_python(tmp_path, WITHOUT.format(other=three)).stdout == "refused\n"
