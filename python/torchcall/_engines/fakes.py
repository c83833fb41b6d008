"""Output shapes and dtypes by tracing with fake tensors, without running the model."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torchcall._call.specs import is_symbolic, torch_dtype, torch_dtype_name
from torchcall._engines.fake_scripts import NotTraceableError, traceable_scripts
from torchcall._undocumented.of_torch import (
    FakeTensorMode,
    TorchDispatchMode,
    disable_current_modes,
    optimized_execution,
)


class InferenceError(ValueError):
    """The outputs' shapes and dtypes cannot be found without running the model."""


_ATEN = torch.ops.aten
_ONE_DTYPE = {
    _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.addmv, _ATEN.dot,
    _ATEN.linear, _ATEN.convolution,
}  # fmt: skip
_NAMED_TUPLES: dict[tuple[str, tuple[str, ...]], type[Any]] = {}
_NEEDS_GRAD = "does not require grad and does not have a grad_fn"


def infer_outputs(
    load: Callable[[], Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    requires_grad: bool,
    change: Callable[[Any], Callable[..., Any]] | None = None,
) -> Any:
    """The pytree of `jax.ShapeDtypeStruct` that the model would return for these arguments.

    Args:
        load: returns the model as a function of fake tensors, with weights on the CPU.
        args: positional arguments; arrays as `jax.ShapeDtypeStruct`s with the dtypes that the
            module gets, everything else unchanged.
        kwargs: keyword arguments, likewise.
        requires_grad: whether autograd records while the model is traced.
        change: makes another function of the model, which is traced instead.

    Raises:
        InferenceError: the model cannot be traced; contains torch's message.
    """
    if any(
        is_symbolic(n) for x in jax.tree.leaves((args, kwargs)) for n in getattr(x, "shape", ())
    ):
        raise InferenceError(
            "the outputs for symbolic sizes cannot be inferred; pass output_spec=..., a function "
            "from the inputs' specs to the outputs', as "
            "lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)"
        )
    operations = _Operations()
    try:
        # The calling thread's modes must not affect the result.
        with torch.device("cpu"), disable_current_modes(), torch.no_grad():
            traced = load() if change is None else change(load())
        with (
            _quiet_logger(FakeTensorMode.__module__),
            torch.device("cpu"),
            disable_current_modes(),
            torch.autocast("cpu", enabled=False),
            FakeTensorMode(allow_non_fake_inputs=True),
            operations,
            traceable_scripts(),
            torch.inference_mode(False),
            torch.set_grad_enabled(requires_grad),
            # No profiling: it would specialise the caller's module for fake tensors.
            optimized_execution(False),
        ):
            fake_args, fake_kwargs = jax.tree.map(_fake, (args, kwargs), is_leaf=_is_leaf)
            return _specs_of(traced(*fake_args, **fake_kwargs), "")
    except InferenceError:
        raise
    except NotTraceableError as error:
        raise InferenceError(
            f"{error}, so the outputs' shapes are unknown; pass output_spec=..."
        ) from error
    except Exception as error:
        # torch raises many types here, RuntimeError and its fake-tensor exceptions among them.
        raise InferenceError(_explain(_text(error), operations.first_error)) from error


class _Operations(TorchDispatchMode):
    """Records the error of the first failed operation, which TorchScript's interpreter may lose."""

    def __init__(self) -> None:
        super().__init__()
        self.first_error = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            if getattr(func, "overloadpacket", None) in _ONE_DTYPE:
                _check_one_dtype(func, args)
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.first_error = self.first_error or _text(error).strip()
            raise


def _check_one_dtype(func: Any, args: tuple[Any, ...]) -> None:
    """Raises where the real operator would. Fake tensors accept matrices of different dtypes."""
    dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
    if len(dtypes) > 1:
        names = " and ".join(sorted(map(torch_dtype_name, dtypes)))
        raise RuntimeError(f"{func}: expected tensors of the same dtype, got {names}")


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """Disables a logger of torch, whose output would repeat the traceback in the error."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _is_leaf(value: object) -> bool:
    return value is None or isinstance(value, jax.ShapeDtypeStruct)


def _fake(value: Any) -> Any:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    return torch.empty(value.shape, dtype=torch_dtype(str(value.dtype)), device="cpu")


def _text(error: Exception) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:  # raised by its own __str__
        return type(error).__name__


def _explain(text: str, first_error: str) -> str:
    reason = _reason(text, first_error)
    if _NEEDS_GRAD in text:
        return (
            "the model differentiates inside its forward: expected requires_grad=True, got "
            f"requires_grad=False ({reason})"
        )
    return (
        "tracing the model with fake tensors, which finds its outputs' shapes, failed; if the "
        f"model itself works, pass output_spec=...\n{reason}"
    )


def _reason(text: str, first_error: str) -> str:
    """The cause, then the TorchScript traceback; the interpreter reports them in reverse order."""
    before, found, after = text.partition("Traceback of TorchScript")
    if not found:
        return text.strip()
    lines = after.splitlines()
    # Source lines of a script function are not indented.
    place = max((i for i, line in enumerate(lines) if line.endswith("<--- HERE")), default=0)
    is_reason = (i for i in range(place + 1, len(lines)) if lines[i] and lines[i][0] != " ")
    start = next(is_reason, len(lines))
    reason = "\n".join(lines[start:]).strip()
    if reason.endswith(":"):
        reason += f" {first_error}"
    return f"{reason}\n\n{before}{found}" + "\n".join(lines[:start])


def _named_tuple(value: Any) -> type[Any]:
    """One class per name and fields, because torch makes a new class for each loaded module."""
    return _NAMED_TUPLES.setdefault((type(value).__name__, value._fields), type(value))


def _specs_of(value: Any, path: str) -> Any:
    match value:
        case torch.Tensor():
            dtype = jnp.dtype(torch_dtype_name(value.dtype))
            return jax.ShapeDtypeStruct(tuple(value.shape), dtype)
        case None:
            return None
        case dict():
            specs = {key: _specs_of(item, f"{path}[{key!r}]") for key, item in value.items()}
            return OrderedDict(specs) if isinstance(value, OrderedDict) else specs
        case list():
            return [_specs_of(item, f"{path}[{i}]") for i, item in enumerate(value)]
        case tuple():
            items = [_specs_of(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return _named_tuple(value)(*items) if hasattr(value, "_fields") else tuple(items)
    raise InferenceError(
        f"output{' ' if path else ''}{path}: expected a tensor, got {type(value).__name__}; return "
        "a tensor, e.g. torch.tensor(value)"
    )
