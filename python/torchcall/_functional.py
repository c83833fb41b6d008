"""`functional`: a torch module as a function of its parameters, for training in JAX."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torchcall._call.call import CallOptions
from torchcall._call.specs import DTYPE_NAMES, torch_dtype_name, type_name
from torchcall._engines.archive import is_package
from torchcall._engines.functional import (
    EagerFunctional,
    ScriptFunctional,
    parameters_of,
)
from torchcall._engines.names import name_of
from torchcall._engines.script import FileSource, LiveSource
from torchcall._undocumented.of_torch import uncompiled
from torchcall._wrapper import TorchModuleWrapper

_OPTIONS = CallOptions(has_parameters=True)


class FunctionalModule(TorchModuleWrapper):
    """`y = apply(parameters, *args, **kwargs)`: a module that gets its parameters in each call.

    Made by `torchcall.functional`. In every other respect it is a `TorchModuleWrapper`.
    """

    def __call__(self, parameters: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self._call((parameters, *args), kwargs, _OPTIONS)

    def warmup(self, parameters: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """`TorchModuleWrapper.warmup` of the call with these arguments."""
        self._warm((parameters, *args), kwargs, _OPTIONS)

    def __reduce__(self) -> Any:
        path = self._source.path
        if path is None:
            raise TypeError(
                self._say("a function of a live module cannot be pickled; use the path of a file")
            )
        return _rebuild, (path, self._options)


def functional(
    module: torch.nn.Module | str | Path, **options: Any
) -> tuple[dict[str, jax.Array], FunctionalModule]:
    """`(θ, apply)` with `apply(θ, *args, **kwargs) = module(*args, **kwargs)`, θ its parameters.

    `apply` is differentiable in the parameters and in the arguments, to any order, and works in
    everything that a `TorchModuleWrapper` does: `jit`, `grad`, `scan`; `vmap` over the parameters
    is an ensemble. TorchScript modules run without Python and without the GIL.

    The module is copied, in its mode (training or eval), and not changed. Buffers are constants of
    this copy. A call is a pure function: a buffer that the module changes is an error, and
    attributes that it assigns have their old values in the next call.

    Args:
        module: a `torch.nn.Module`, a `torch.jit.ScriptModule`, or the path of a TorchScript
            archive. What `torch.compile` returned is not compiled here. A frozen TorchScript module
            has no parameters.
        **options: those of `TorchModuleWrapper`, except `freeze`. `input_spec`, `output_spec` and
            `sharding_rule` are for a call of `apply`: the parameters are its first argument. With
            `vmap_method` "expand_dims" or "broadcast_all", parameters that are not mapped stay as
            they are; where they are mapped, or differentiated per element, calls are sequential.

    Returns:
        The parameters, a dict of arrays by the names of `module.named_parameters()`, and `apply`.
        Parameters that do not require grad are included. Those of integers are constants. Of
        parameters that share their memory, the first name is the key. Arrays that a call gets must
        have the same shapes and dtypes.

    Raises:
        TypeError: the module is a package, a function or of another type, cannot be copied, or
            JAX cannot hold the dtype of a parameter.
        ValueError: a part of the module updates running statistics; an option is wrong. At a call:
            a parameter is missing, or its shape or dtype is wrong; the message names it.
    """
    if "freeze" in options:
        raise TypeError(
            "torchcall: functional: freeze: expected no such option: it makes parameters constants"
        )
    if isinstance(module, str | Path):
        path, module = Path(module), _loaded(Path(module))
    else:
        path, module = None, uncompiled(module)
    if not isinstance(module, torch.nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type_name(module)
        raise TypeError(
            "torchcall: functional: expected a torch.nn.Module, a torch.jit.ScriptModule or the "
            f"path of a TorchScript archive, got {got}"
        )
    _refuse_statistics(module)
    found = parameters_of(module)
    values = {parameter.names[0]: value for parameter, value in found}
    parameters = [parameter for parameter, _ in found]
    share_inputs = options.get("share_inputs") is True
    if isinstance(module, torch.jit.ScriptModule):
        own = LiveSource(_copied(module)) if path is None else FileSource(path)
        source = ScriptFunctional(own, name_of(module), parameters)
    else:
        source = EagerFunctional(module, parameters, share_inputs=share_inputs)
    apply = FunctionalModule(source, **options)  # pyright: ignore[reportArgumentType]
    return {key: _array(apply, key, value) for key, value in values.items()}, apply


def _loaded(path: Path) -> torch.jit.ScriptModule:
    if path.exists() and is_package(path):
        raise TypeError(
            f"torchcall: {path.name}: functional: expected a module, got a package, whose "
            "parameters are constants; pass the module that it was compiled from"
        )
    FileSource(path)  # checks the file
    return torch.jit.load(path, map_location="cpu")


@torch.no_grad()
def _copied(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    return copy.deepcopy(module).cpu()


def _refuse_statistics(module: torch.nn.Module) -> None:
    for name, part in module.named_modules():
        statistics = dict(part.named_buffers(recurse=False)).get("running_mean")
        # A frozen module has no mode.
        if getattr(part, "training", False) and statistics is not None:
            raise ValueError(
                f"torchcall: {name_of(module)}: functional: {name or 'the module'}: expected a "
                "module that does not change its buffers, got one that updates running statistics "
                "in training mode; call .eval() on it, or make it with track_running_stats=False"
            )


def _array(apply: FunctionalModule, key: str, value: torch.Tensor) -> jax.Array:
    """A copy of a parameter as a JAX array, on JAX's default device."""
    dtype = torch_dtype_name(value.dtype)
    if dtype not in DTYPE_NAMES:
        raise TypeError(apply._say(f"parameters[{key!r}]: expected a dtype of JAX, got {dtype}"))
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            apply._say(
                f"parameters[{key!r}]: expected a dtype that JAX can hold, got {dtype} with x64 "
                "off; pass module.float(), or set jax.config.update('jax_enable_x64', True)"
            )
        )
    value = value.detach().cpu().contiguous()
    if dtype.startswith(("bfloat", "float8")):  # which NumPy does not have
        bits = torch.int16 if value.itemsize == 2 else torch.uint8
        return jnp.array(value.view(bits).numpy().view(jnp.dtype(dtype)))
    return jnp.array(value.numpy())


def _rebuild(path: Path, options: dict[str, Any]) -> FunctionalModule:
    return functional(path, **{k: v for k, v in options.items() if k != "freeze"})[1]
