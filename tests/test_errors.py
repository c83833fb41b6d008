"""Errors inside models: their text, the location they name, and that later calls work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import RaisesWhenNegative, assert_same, double, error_of, like_input, run_python
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


class RaisesValueError(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 0:
            raise ValueError("atoms are too close")
        return x


class RaisesFormatted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 0:
            raise RuntimeError(f"got {x.size(0)} rows,\nexpected 7")
        return x


class Asserts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.size(0) == 7, "seven rows are needed"
        return x


class BadMatmul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


class IndexesBeyond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[x.long().sum() + 100]


class FailsInSubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout = RaisesValueError()

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x) + 1


class MissingKey(nn.Module):
    def forward(self, d: dict[str, Tensor]) -> Tensor:
        return d["positions"]


class SingularMatrix(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(torch.zeros(2, 2)) @ x


class UnwrapsNone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if x.size(0) > 7:
            y = x
        assert y is not None
        return y


class DividesByZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.size(0) // (x.size(0) - 2)


class ReadsTooManyValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.item()


FAILING = [
    pytest.param(RaisesValueError(), "atoms are too close", id="a raised ValueError"),
    pytest.param(RaisesFormatted(), "got 2 rows,\nexpected 7", id="a message of two lines"),
    pytest.param(Asserts(), "seven rows are needed", id="an assertion"),
    pytest.param(BadMatmul(), "mat1 and mat2 shapes cannot be multiplied", id="mismatched shapes"),
    pytest.param(IndexesBeyond(), "out of bounds", id="an index out of bounds"),
    pytest.param(FailsInSubmodule(), "atoms are too close", id="an error in a submodule"),
    pytest.param(SingularMatrix(), "singular", id="a singular matrix"),
    pytest.param(UnwrapsNone(), "AssertionError", id="an assertion without a message"),
    pytest.param(DividesByZero(), "ero", id="a division by zero"),
    pytest.param(ReadsTooManyValues(), "cannot be converted to Scalar", id="an operator's error"),
]


@pytest.mark.parametrize("module, part", FAILING)
@pytest.mark.parametrize("where", ["eagerly", "under jit", "in a loop"])
def test_error_inside_the_model_is_reported_and_later_calls_work(module, part, where):
    f = TorchModuleWrapper(torch.jit.script(module), output_spec=like_input)
    call = {
        "eagerly": f,
        "under jit": jax.jit(lambda x: f(x) + 1),
        "in a loop": jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: f(x), x)),
    }[where]
    for _ in range(3):
        text = error_of(lambda: call(X))
        assert f"torchcall: {type(module).__name__}: raised" in text
        assert part in text
    assert_same(jax.jit(TorchModuleWrapper(torch.jit.script(double)))(X), 2 * X)


def test_error_text_puts_the_cause_before_the_traceback():
    f = TorchModuleWrapper(torch.jit.script(FailsInSubmodule()), output_spec=like_input)
    text = error_of(lambda: f(X))
    assert "ValueError" in text.splitlines()[0]
    assert text.index("atoms are too close") < text.index("Traceback of TorchScript")
    assert "test_errors.py" in text  # torch's own traceback names the line of the model


def raises(x: Tensor) -> Tensor:
    if x.dim() > 0:
        raise ValueError("atoms are too close")
    return x


def calls_raises(x: Tensor) -> Tensor:
    return raises(x)


@pytest.mark.parametrize("function", [raises, calls_raises])
@pytest.mark.parametrize("spec", [None, like_input], ids=["traced", "called"])
def test_the_cause_comes_first_for_functions_whose_source_is_not_indented(function, spec):
    f = TorchModuleWrapper(torch.jit.script(function), output_spec=spec)
    text = error_of(lambda: f(X))
    assert text.index("ValueError: atoms are too close") < text.index("Traceback of TorchScript")
    assert text.index("Traceback of TorchScript") < text.index("def raises(x")


def test_error_has_no_cpp_stack_trace_even_when_torch_enables_it(tmp_path):
    code = """
        import jax, numpy as np, torch, torchcall
        from models import error_of, like_input
        from test_errors import BadMatmul, RaisesValueError

        cases = (BadMatmul(), "cannot be multiplied"), (RaisesValueError(), "too close")
        for module, part in cases:
            f = torchcall.TorchModuleWrapper(torch.jit.script(module), output_spec=like_input)
            text = error_of(lambda: f(np.ones((2, 3), np.float32)))
            assert part in text
            assert "c10::" not in text and ".cpp" not in text and ".so" not in text, text
        print("done")
    """
    env = {"TORCH_SHOW_CPP_STACKTRACES": "1"}
    assert run_python(tmp_path, code, fresh=True, **env).stdout == "done\n"


def test_missing_key_of_a_dict_is_reported():
    f = TorchModuleWrapper(
        torch.jit.script(MissingKey()), output_spec=jax.ShapeDtypeStruct((2, 3), "f4")
    )
    text = error_of(lambda: f({"pos": X}))
    assert "positions" in text
    assert_same(f({"positions": X}), X)


def test_program_works_after_an_error_that_depends_on_values():
    f = TorchModuleWrapper(torch.jit.script(RaisesWhenNegative()), output_spec=like_input)
    program = jax.jit(f)
    for _ in range(50):
        assert_same(program(X), 2 * X)
        assert "the sum is negative" in error_of(lambda: program(-X))
    assert f.stats()["calls"] == 100


def test_error_in_the_middle_of_a_loop_ends_the_loop():
    f = TorchModuleWrapper(torch.jit.script(RaisesWhenNegative()), output_spec=like_input)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: f(x) * 0.5 - 1, x))
    text = error_of(lambda: program(jnp.full(2, 10.0)))
    assert "the sum is negative" in text
    assert f.stats()["calls"] < 20
    np.testing.assert_array_equal(f(X), 2 * X)


def test_error_of_failed_output_inference_contains_torchs_message():
    f = TorchModuleWrapper(torch.jit.script(BadMatmul()))
    text = error_of(lambda: f(X))
    assert text.startswith("torchcall: BadMatmul: ")
    assert "cannot be multiplied" in text or "shapes" in text
    assert "(torch gives no message)" not in text


def test_error_at_trace_time_is_an_ordinary_exception():
    f = TorchModuleWrapper(torch.jit.script(double))
    with pytest.raises((TypeError, ValueError)):
        jax.jit(lambda x: f([x]))(X)
    with pytest.raises((TypeError, ValueError)):
        jax.lax.scan(lambda c, x: (f(c, x), x), X, X)
    assert_same(f(X), 2 * X)


def nested_error(d: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {"out": [d["in"][0], d["in"][1] * 2]}


def test_errors_name_operands_and_outputs_by_their_pytree_paths():
    f = TorchModuleWrapper(torch.jit.script(nested_error))
    text = error_of(lambda: f({"in": [X, X.astype(object)]}))
    assert "operand args[0]['in'][1]: " in text
    text = error_of(lambda: f(d={"in": [X, 3]}))
    assert "operand kwargs['d']['in'][1]: expected Tensor" in text
    spec = {"out": [jax.ShapeDtypeStruct((2, 3), "f4"), jax.ShapeDtypeStruct((4,), "f4")]}
    g = TorchModuleWrapper(torch.jit.script(nested_error), output_spec=spec)
    text = error_of(lambda: g({"in": [X, X]}))
    assert text.endswith("output ['out'][1]: expected float32 (4,), got float32 (2, 3)")


@pytest.mark.parametrize(
    "shape, text", [((), "()"), ((4,), "(4,)"), ((2, 3), "(2, 3)"), ((0, 1), "(0, 1)")]
)
def test_errors_write_shapes_and_dtypes_as_numpy_does(shape, text):
    spec = jax.ShapeDtypeStruct((9,), "bfloat16")
    f = TorchModuleWrapper(torch.jit.script(double), output_spec=spec)
    message = error_of(lambda: f(np.ones(shape, np.int32)))
    assert message.endswith(f": expected bfloat16 (9,), got int32 {text}")


def test_error_message_that_imitates_torchs_traceback_is_preserved():
    f = TorchModuleWrapper(torch.jit.script(ImitatesTorchsTraceback()), output_spec=like_input)
    text = error_of(lambda: f(X))
    assert "Traceback of TorchScript is my favourite" in text


class ImitatesTorchsTraceback(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 0:
            raise ValueError("Traceback of TorchScript is my favourite\n  indented: 5% {braces}")
        return x


def test_errors_in_concurrent_calls_are_all_reported():
    f = TorchModuleWrapper(torch.jit.script(RaisesWhenNegative()), output_spec=like_input)
    results = []
    for i in range(20):
        try:
            results.append(f(X if i % 2 else -X))
        except (RuntimeError, ValueError) as error:
            results.append(error)
    for i, result in enumerate(results):
        if i % 2:
            assert_same(result, 2 * X)
        elif isinstance(result, Exception):
            assert re.search("torchcall: RaisesWhenNegative: ", str(result))
        else:
            assert "negative" in error_of(lambda result=result: result)


def test_process_exits_cleanly_while_computations_run(tmp_path):
    code = """
        import jax, jax.numpy as jnp, torch, torchcall
        from models import Counter, double

        f = torchcall.TorchModuleWrapper(torch.jit.script(Counter()))
        g = torchcall.TorchModuleWrapper(torch.jit.script(double))
        program = jax.jit(lambda x: jax.lax.fori_loop(0, 10_000, lambda _, x: f(g(x)) * 0.1, x))
        y = [program(jnp.ones(3) * i) for i in range(3)]
    """
    done = run_python(tmp_path, code)
    assert "Fatal" not in done.stderr
    printed = [line for line in done.stderr.splitlines() if "nanobind" in line]
    # Triton 3.9, which CUDA builds of torch 2.15 bring, prints what is left of its own objects,
    # also without torchcall. torchcall and jaxlib switch that off.
    if "triton._C" in done.stderr:
        printed = [line for line in printed if not re.search("leaked|refleaks|refer", line)]
    assert not printed
