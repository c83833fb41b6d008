"""Other processes: the persistent compilation cache, fork, pickles, serialised executables."""

import pickle

import numpy as np
import pytest
import torch
from models import Linear, Scale, assert_same, double, error_of, run_python, torch_of

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)

CACHED = """
    import gc
    import jax, numpy as np, torch, torchcall
    from models import Linear, Scale, double

    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    {before}
    jax.config.update("jax_compilation_cache_dir", {folder!r})
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for factor in {factors}:
        f = torchcall.TorchModuleWrapper(torch.jit.script(Scale(factor)))
        program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: f(x), x))
        y = np.asarray(program(x))
        np.testing.assert_array_equal(y, x * factor**3)
        print(events.count("/jax/compilation_cache/cache_hits"))
        del f, program
        jax.clear_caches()
        gc.collect()
"""

OTHERS = """
    others = [torchcall.TorchModuleWrapper(torch.jit.script(m)) for m in (Linear(), double)]
    [o(x) for o in others]
"""


def test_persistent_cache_hits_in_a_process_with_other_models_and_weights(tmp_path):
    """Neither what is registered before nor the weights' values are part of a program."""
    folder = str(tmp_path / "cache")
    first = run_python(tmp_path, CACHED.format(before="", factors=(2.0,), folder=folder))
    assert first.stdout == "0\n"
    before = OTHERS.strip().replace("\n    ", "; ").replace("]; [", "]; [")
    second = run_python(
        tmp_path, CACHED.format(before=before, factors=(2.0, 5.0), folder=folder), fresh=True
    )
    assert second.stdout == "1\n2\n"


TWINS = """
    import jax, numpy as np, torch, torchcall
    from models import Scale

    jax.config.update("jax_compilation_cache_dir", {folder!r})
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    x = np.ones(3, np.float32)
    for order in {orders}:
        wrappers = {{s: torchcall.TorchModuleWrapper(torch.jit.script(Scale(s))) for s in order}}
        for factor, f in wrappers.items():
            np.testing.assert_array_equal(jax.jit(lambda x: f(x) + 1)(x), x * factor + 1)
        both = jax.jit(lambda x: [f(x) for f in wrappers.values()])(x)
        np.testing.assert_array_equal(both, [x * factor for factor in wrappers])
        jax.clear_caches()
    print("right")
"""


def test_persistent_cache_never_mixes_equal_code_with_other_weights(tmp_path):
    folder = str(tmp_path / "cache")
    for orders in ([(2.0, 3.0)], [(3.0, 2.0), (5.0, 3.0, 2.0)]):
        fresh = len(orders) == 2
        done = run_python(tmp_path, TWINS.format(folder=folder, orders=orders), fresh=fresh)
        assert done.stdout == "right\n"


FORK = """
    import os, sys
    import jax, numpy as np, torch, torchcall, warnings
    from models import double, error_of

    x = np.ones(3, np.float32)
    f = torchcall.TorchModuleWrapper(torch.jit.script(double))
    program = jax.jit(lambda x: f(x) + 1)
    jax.block_until_ready(program(x)), f(x)
    warnings.simplefilter("ignore")  # JAX warns about fork itself
    child = os.fork()
    if child == 0:
        for call in (lambda: f(x), lambda: jax.jit(f)(x), f.refresh, lambda: f.warmup(x)):
            text = error_of(call)
            assert "\\n" not in text and "fork" in text and "spawn" in text, text
        print("one-line errors", flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    np.testing.assert_array_equal(program(x), 2 * x + 1)
    print(status)
"""


def test_forked_child_gets_one_line_errors_and_the_parent_goes_on(tmp_path):
    assert run_python(tmp_path, FORK).stdout == "one-line errors\n0\n"


FORKED_WRAPPER = """
    import os
    import jax, numpy as np, torch, torchcall, warnings
    from models import double, error_of, like_input

    warnings.simplefilter("ignore")
    torchcall.load  # imported before the fork
    child = os.fork()
    if child == 0:
        f = torchcall.TorchModuleWrapper(torch.jit.script(double), output_spec=like_input)
        text = error_of(lambda: f(np.ones(3, np.float32)))
        assert "\\n" not in text and "fork" in text, text
        print("one-line error", flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_wrapper_made_in_a_forked_child_gets_a_one_line_error(tmp_path):
    assert run_python(tmp_path, FORKED_WRAPPER).stdout == "one-line error\n0\n"


def test_wrapper_of_a_path_is_pickled_by_its_path(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Linear()).save(path)
    f = TorchModuleWrapper(path, input_spec=torch.float32, requires_grad=True)
    data = pickle.dumps(f)
    assert len(data) < 2000
    g = pickle.loads(data)
    assert g is not f
    assert g != f
    assert_same(g(X.astype(np.int32)), Linear()(torch_of(X)))
    assert "requires_grad=True" in repr(g)
    assert g.stats()["calls"] == 1
    assert f.stats()["calls"] == 0


def test_pickled_wrapper_means_the_same_file_in_another_folder(tmp_path, monkeypatch):
    for name, factor in (("here", 2.0), ("there", 9.0)):
        (tmp_path / name).mkdir()
        torch.jit.script(Scale(factor)).save(tmp_path / name / "model.pt")
    monkeypatch.chdir(tmp_path / "here")
    data = pickle.dumps(TorchModuleWrapper("model.pt"))
    monkeypatch.chdir(tmp_path / "there")
    assert_same(pickle.loads(data)(X), 2 * X)


def test_pickle_of_a_file_that_is_gone_is_an_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Linear()).save(path)
    data = pickle.dumps(TorchModuleWrapper(path))
    path.unlink()
    text = error_of(lambda: pickle.loads(data))
    assert "model.pt" in text
    assert "no such file" in text


def test_wrapper_of_a_live_module_is_not_pickled():
    f = TorchModuleWrapper(torch.jit.script(double))
    text = error_of(lambda: pickle.dumps(f))
    assert text.startswith("torchcall: double: ")
    assert "\n" not in text
    assert "path" in text
    assert_same(f(X), 2 * X)


SPAWN = """
    import multiprocessing
    import numpy as np, torch, torchcall
    from models import Linear

    def work(f, x):
        return np.asarray(f(x))

    if __name__ == "__main__":
        torch.jit.script(Linear()).save("model.pt")
        f = torchcall.TorchModuleWrapper("model.pt")
        x = np.ones((2, 3), np.float32)
        expected = np.asarray(f(x))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(work, (f, x)), expected)
        print("same")
"""


def test_wrapper_travels_to_a_spawned_worker(tmp_path):
    assert run_python(tmp_path, SPAWN).stdout == "same\n"


SAVES = """
    import pickle
    import jax, numpy as np, torch, torchcall
    from jax.experimental.serialize_executable import serialize
    from models import double

    torch.jit.script(double).save("double.pt")
    f = torchcall.TorchModuleWrapper("double.pt")
    compiled = jax.jit(lambda x: f(x) + 1).lower(np.ones(3, np.float32)).compile()
    with open("program.bin", "wb") as file:
        pickle.dump(serialize(compiled), file)
"""

LOADS = """
    import pickle
    import jax, numpy as np, torch, torchcall
    from jax.experimental.serialize_executable import deserialize_and_load
    from models import double, error_of

    x = np.ones(3, np.float32)
    with open("program.bin", "rb") as file:
        saved = pickle.load(file)
    torchcall.TorchModuleWrapper("double.pt")(np.ones(5, np.float32))
    text = error_of(lambda: deserialize_and_load(*saved)(x))
    assert "call the wrapper once" in text, text
    f = torchcall.TorchModuleWrapper("double.pt")
    np.testing.assert_array_equal(f(x), 2 * x)
    np.testing.assert_array_equal(deserialize_and_load(*saved)(x), 2 * x + 1)
    print("done")
"""


def test_serialised_executable_wants_its_wrapper_first(tmp_path):
    run_python(tmp_path, SAVES, name="saves.py")
    assert run_python(tmp_path, LOADS, name="loads.py", fresh=True).stdout == "done\n"


def test_wrapper_works_after_jax_makes_a_new_client(tmp_path):
    code = """
        import jax, numpy as np, torch, torchcall
        from models import double

        f = torchcall.TorchModuleWrapper(torch.jit.script(double))
        x = np.ones(3, np.float32)
        np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)
        jax.extend.backend.clear_backends()
        jax.clear_caches()
        np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)
        print("done")
    """
    code = code.replace("import jax,", "import jax, jax.extend,")
    assert run_python(tmp_path, code).stdout == "done\n"
