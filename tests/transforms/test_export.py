"""`jax.export` of programs with torch calls: they run in another process, with their own models."""

import gc
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from models import Linear, Scale, Spring, assert_same, double, error_of, run_python
from torch import Tensor

import torchcall
from torchcall import TorchModuleWrapper
from torchcall._call.exported import ExportedCall

X = np.linspace(-1, 1, 3, dtype=np.float32)
XS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


class Options(torch.nn.Module):
    """Takes a dict, a list and Python values; returns a dict."""

    def forward(self, given: dict[str, Tensor], more: list[Tensor], power: float, name: str):
        scale = 10.0 if name == 'α "β" \\ \n' else 0.0
        return {"power": given["x"].pow(power), "rows": scale * more[0][given["index"]]}


def options_in_jax(given, more, power, name):
    del name
    return {"power": given["x"] ** power, "rows": 10.0 * more[0][given["index"]]}


LINEAR = Linear()
WEIGHTS = [jnp.asarray(tensor.detach().numpy()) for tensor in LINEAR.state_dict().values()]


def linear_in_jax(x):
    weight, bias, offset = WEIGHTS
    return jnp.matmul(x, weight.T, precision="highest") + bias + offset


TWINS = SimpleNamespace(
    two=lambda x: 2 * x,
    five=lambda x: 5 * x,
    frozen=lambda x: 7 * x,
    linear=linear_in_jax,
    one_call=linear_in_jax,
    spring=lambda x: (1.5 * (x * x).sum(), 3 * x),
    options=options_in_jax,
)


def steps(m):
    def step(x, _):
        return m.two(x) - m.five(jnp.sin(x)), (m.linear(x), m.frozen(x))

    return lambda x: jax.lax.scan(step, x, None, 3)


def squares(f):
    return lambda x: (f(x) ** 2).sum()


# Of models or their twins in JAX: the program and its arguments.
PROGRAMS = {
    "two models": (lambda m: lambda x: m.two(x) - m.five(x), X),
    "value and gradient": (lambda m: jax.value_and_grad(squares(m.linear)), X),
    "second derivatives": (lambda m: jax.hessian(squares(m.linear)), X),
    "one call per element": (lambda m: jax.vmap(m.linear), XS),
    "gradients per element, in one call": (lambda m: jax.vmap(jax.grad(squares(m.one_call))), XS),
    "several models in a loop": (steps, X),
    "a model that differentiates": (lambda m: m.spring, X),
    "Python values and int64 indices": (
        lambda m: (
            lambda x: m.options(
                {"x": x, "index": jnp.array([2, 0])}, [x], power=2.0, name='α "β" \\ \n'
            )
        ),
        X,
    ),
}

CHILD = """
    import gc, pickle, sys
    from pathlib import Path
    import jax, numpy as np, torch, torchcall
    from jax import export
    from models import Scale
    sys.path.append({folder!r})
    from test_export import wrapped

    order = {order}
    jax.config.update("jax_compilation_cache_dir", str(Path("cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
    cases = pickle.loads(Path("cases").read_bytes())
    programs = {{name: export.deserialize(bytearray(blob)) for name, (blob, *_) in cases.items()}}
    x = cases["two models"][1]

    def error(f, x):
        try:
            jax.block_until_ready(f(x))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return str(error)

    def say(f):
        print(error(f, x))

    if order == 1:
        torchcall.load  # imports the library
        say(programs["one model"].call)  # no model
        other = torchcall.load("five.pt")
        say(programs["one model"].call)  # the same code with other weights
        del other
        again = torchcall.load("two.pt", requires_grad=True)
        say(programs["one model"].call)  # other options
        del again
        Path("copy.pt").write_bytes(Path("two.pt").read_bytes())
        changed = torchcall.load("copy.pt")
        Path("copy.pt").write_bytes(Path("five.pt").read_bytes())
        say(programs["one model"].call)  # a changed file
        del changed
        torchcall.load("two.pt")
        say(programs["one model"].call)  # a dropped wrapper

    names = {names}[::order]
    wrappers = {{name: wrapped(name) for name in names}}
    if order == 1:
        version, torch.__version__ = torch.__version__, "2.99.0"
        say(programs["one model"].call)  # another torch
        torch.__version__ = version
    for name, (_, given, expected) in cases.items():
        run = programs[name].call
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6, err_msg=name),
            jax.jit(lambda x: jax.tree.map(lambda y: y / 2, run(x)))(given),
            jax.tree.map(lambda y: y / 2, expected),
        )
    print("from the cache" if any(hits) else "compiled")

    # A program that was loaded keeps its models, and their weights.
    run = programs["one model"].call
    jitted = jax.jit(run)
    run(x), jitted(x)
    two = wrappers.pop("two")
    del wrappers
    if order == 1:
        del two
        gc.collect()
        np.testing.assert_array_equal(jitted(x), 2 * x)
    else:
        two.refresh()
        np.testing.assert_array_equal(jitted(x), 2 * x)
        Path("two.pt").write_bytes(Path("five.pt").read_bytes())
        two.refresh()
        say(run)
        say(jitted)
        say(jax.jit(lambda x: run(x) + 1))
        torch.jit.script(Scale(2.0)).save("two.pt")
        two.refresh()
        np.testing.assert_array_equal(jitted(x), 2 * x)
"""


def wrapped(name):
    """A model of the current folder, as the exporting process and the others wrap it."""
    if name == "frozen":
        return TorchModuleWrapper(torch.jit.script(Scale(7.0).eval()), freeze=True)
    options = {
        "one_call": {"vmap_method": "expand_dims"},
        "spring": {"requires_grad": True},
        "options": {"input_spec": (({"x": None, "index": torch.int64}, None), None)},
    }
    file = "linear" if name == "one_call" else name
    return torchcall.load(f"{file}.pt", **options.get(name, {}))


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def exported(f, *args, **options):
    program = export.export(jax.jit(f), disabled_checks=torchcall.export_checks(), **options)
    return program(*args)


def test_programs_run_in_processes_that_wrap_the_models_in_any_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = {
        "two": Scale(2.0),
        "five": Scale(5.0),
        "linear": LINEAR,
        "spring": Spring(),
        "options": Options(),
    }
    for name, module in modules.items():
        torch.jit.script(module).save(f"{name}.pt")
    names = ["two", "five", "frozen", "linear", "one_call", "spring", "options"]
    models = SimpleNamespace(**{name: wrapped(name) for name in names})
    cases = {}
    for name, (program, x) in PROGRAMS.items():
        made = exported(program(models), x)
        expected = program(TWINS)(x)
        cases[name] = bytes(made.serialize()), x, jax.tree.map(np.asarray, expected)
    one = exported(lambda x: models.two(x), X)
    assert_same(one.call(X), 2 * X)  # this process runs it, too
    cases["one model"] = bytes(one.serialize()), X, 2 * X
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    said = []
    for order in (1, -1):
        code = CHILD.format(order=order, names=names, folder=str(Path(__file__).parent))
        said.append(run_python(tmp_path, code, name=f"{order}.py").stdout.splitlines())
    missing, other_weights, other_options, changed, dropped, other_torch = said[0][:6]
    for text in (*said[0][:6], *said[1][1:4]):
        assert re.match("[A-Z_]+: torchcall: Scale \\(two.pt\\): ", text), text
    for text in (missing, dropped):
        assert "got no model in this process; wrap the file" in text
    assert "got Scale (five.pt) with other weights" in other_weights
    assert "requires_grad=False, got one with freeze=False, requires_grad=True" in other_options
    assert "got Scale (copy.pt), whose file changed" in changed
    assert "expected torch 2." in other_torch
    assert "got torch 2.99.0" in other_torch
    refreshed, jitted, compiled = said[1][1:4]
    assert "exported with, got others: refresh() replaced them" in refreshed
    assert jitted == refreshed
    assert "got Scale (two.pt) with other weights" in compiled
    assert [said[0][6:], said[1][:1], said[1][4:]] == [["compiled"], ["from the cache"], []]


@pytest.mark.parametrize(
    "model, instead",
    [
        (double, "torchcall.compile"),
        (torch.jit.script(double), "save the module to a file"),
        (torch.jit.script(Scale(2.0)), "freeze=True"),
    ],
    ids=["eager", "function", "module"],
)
def test_a_model_without_content_is_not_exported(model, instead):
    text = error_of(lambda: exported(TorchModuleWrapper(model), X))
    assert "cannot export a program: expected" in text
    assert instead in text


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.pt"
    torch.jit.script(Scale(2.0)).save(path)
    return path


def test_a_file_that_changed_is_not_exported(two):
    f = torchcall.load(two)
    torch.jit.script(Scale(3.0)).save(two)
    assert "got one that changed since; call refresh()" in error_of(lambda: exported(f, X))
    f.refresh()
    assert_same(exported(f, X).call(X), 3 * X)


def test_a_process_without_any_model_is_told_to_load_it(two, tmp_path):
    (tmp_path / "program").write_bytes(exported(torchcall.load(two), X).serialize())
    code = """
        import jax, jax.export, jax.numpy as jnp, torchcall
        program = jax.export.deserialize(bytearray(open("program", "rb").read()))
        try:
            program.call(jnp.ones(3))
        except jax.errors.JaxRuntimeError as error:
            print(error)
    """
    said = run_python(tmp_path, code).stdout
    assert "first load the program's model with torchcall.load(path)" in said


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_platforms_without_the_model_are_refused(two, platform):
    if platform == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is a platform with the model")
    text = error_of(lambda: exported(torchcall.load(two), X, platforms=[platform]))
    assert re.search(f"(?i)two.pt.*{platform}.*run the program on the CPU", text)


def test_an_export_without_the_checks_names_the_target(two):
    with pytest.raises(ValueError, match="torchcall_exported"):
        export.export(jax.jit(torchcall.load(two)))(X)


def test_derivatives_of_an_exported_program(two):
    f = torchcall.load(two)
    program = exported(lambda x: (f(x) ** 3).sum(), X)
    blob = program.serialize(vjp_order=2)
    again = export.deserialize(blob)
    assert_close(jax.grad(again.call)(X), 24 * X**2)
    second = jax.grad(lambda x: jax.grad(again.call)(x).sum())
    assert_close(second(X), 48 * X)


# Symbolic sizes


def rows_of_four(x):
    return jax.ShapeDtypeStruct((*x.shape[:-1], 4), x.dtype)


@pytest.fixture
def linear(tmp_path):
    path = tmp_path / "linear.pt"
    torch.jit.script(LINEAR).save(path)
    return torchcall.load(path, output_spec=rows_of_four)


def symbolic(text, scope=None):
    return jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), np.float32)


@pytest.mark.parametrize(
    "program, shape",
    [
        (lambda f: f, "b, 3"),
        (lambda f: lambda x: jax.value_and_grad(squares(f))(x), "b, 3"),
        (lambda f: jax.vmap(jax.vmap(f)), "b, 2*b + 1, 3"),
        (lambda f: jax.vmap(jax.grad(squares(f)), 1), "3, b"),
    ],
    ids=["call", "gradient", "nested vmap", "vmap of a gradient"],
)
def test_one_export_serves_every_size(linear, program, shape):
    made = exported(program(linear), symbolic(shape))
    program_of_twin = program(linear_in_jax)
    for b in (1, 4):
        x = np.cos(np.arange(3 * b * (2 * b + 1), dtype=np.float32))
        x = (
            x[: 3 * b].reshape([3, b] if shape == "3, b" else [b, 3])
            if "*" not in shape
            else (x.reshape(b, 2 * b + 1, 3))
        )
        jax.tree.map(assert_close, made.call(x), program_of_twin(x))


def test_symbolic_sizes_need_the_outputs_sizes(two):
    text = error_of(lambda: exported(torchcall.load(two), symbolic("b")))
    assert "pass output_spec=..., a function" in text


def test_outputs_of_other_sizes_than_promised_are_an_error(two):
    f = torchcall.load(two, output_spec=lambda x: jax.ShapeDtypeStruct((x.shape[0] + 1,), x.dtype))
    text = error_of(lambda: exported(f, symbolic("b")).call(X))
    assert "output: expected float32 (4,), got float32 (3,)" in text


def test_symbolic_sizes_outside_of_exports_are_an_error(linear):
    text = error_of(lambda: jax.jit(linear).lower(symbolic("b, 3")))
    assert "symbolic" in text


def test_an_exported_program_is_released_with_its_last_user(linear):
    def calls():
        gc.collect()
        return sum(isinstance(x, ExportedCall) for x in gc.get_objects())

    jax.clear_caches()
    before = calls()
    made = exported(linear, symbolic("b, 3"))
    jax.block_until_ready(made.call(XS))
    assert calls() > before
    del made
    jax.clear_caches()
    assert calls() == before
