"""Your own potential: a module, a TorchScript archive, or a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchcall._engines.archive import (
    TORCHSCRIPT,
    PickledModelError,
    check_archive,
    is_package,
)
from torchcall.mliap import TorchMliap
from torchcall.models import _common

NAMES: tuple[str, ...] = ()


def recognises(source: object) -> bool:
    """Whether a source is a module, a TorchScript archive or a package."""
    if isinstance(source, str | Path):
        return _common.is_file(source) and not _common.pickled_names(source)
    return callable(source)


@_common.one_at_a_time
def load(
    source: str | Path | Callable[..., Any],
    *,
    cutoff: float | None = None,
    gradients: bool | None = None,
    dtype: Any = None,
    engine: Any = "auto",
    device: Any = None,
    verbose: bool = True,
    **options: Any,
) -> TorchMliap:
    """Loads a module that takes an `AtomGraphInput`, or a package of `torchcall.mliap.compile`.

    Args:
        source: a package, a TorchScript archive, or a module.
        cutoff: in Å; None: the attribute `cutoff` of the module, or what the package records.
        gradients: False for a module that returns energies (B,) only, which torchcall
            differentiates; True for one that returns a dict as described in `TorchMliapForward`,
            with cell gradients. None: True for TorchScript whose `forward` returns a dict of
            tensors. Packages need no such option.
        dtype, engine, device, verbose: see `torchcall.models.load`.
        **options: options of `TorchModuleWrapper`.

    Raises:
        TypeError, ValueError: the source or an option is wrong; the message names it.
    """
    if isinstance(source, str | Path) and is_package(Path(source)):
        _refuse(source, cutoff=cutoff, dtype=dtype, **_for_energies(options))
        if _common.checked_engine(engine) not in ("auto", "package"):
            raise ValueError(
                f"torchcall: {source}: engine: expected 'auto' or 'package' for a package, got "
                f"{engine!r}"
            )
        model = TorchMliap.from_package(source, **options)
        if verbose:
            _common.report(model, f"{source}: a package")
        return model
    module: Any = source
    if isinstance(source, str | Path):
        module = torch.jit.load(source, map_location="cpu").eval()
    title = f"{source if isinstance(source, str | Path) else type(module).__name__}"
    if gradients is None:
        gradients = _returns_dict(module)
    if not gradients:
        return _common.build(
            module,
            title=title,
            cutoff=cutoff,
            dtype=dtype,
            engine=engine,
            device=device,
            verbose=verbose,
            **options,
        )
    _refuse(title, dtype=dtype, **_for_energies(options))
    if _common.checked_engine(engine) != "auto":
        raise ValueError(
            f"torchcall: {title}: engine: expected 'auto' for a module with gradients of its own, "
            f"got {engine!r}"
        )
    length = getattr(module, "cutoff", None) if cutoff is None else cutoff
    if length is None:
        raise ValueError(
            f"torchcall: {title}: cutoff: expected a length in Å, got none, and the module has no "
            "attribute `cutoff`"
        )
    model = TorchMliap.from_module(module, float(length), True, **options)
    if verbose:
        _common.report(model, title)
    return model


def check_file(path: str | Path) -> None:
    """Raises ValueError unless a file is a package or a TorchScript archive that is complete."""
    if is_package(Path(path)):
        return  # checked where it is loaded
    try:
        check_archive(Path(path), TORCHSCRIPT)
    except PickledModelError as error:
        raise ValueError(
            f"torchcall: {path}: expected a checkpoint of a known network, a TorchScript archive "
            "or a package, got a pickle of something else"
        ) from error


def _returns_dict(module: Any) -> bool:
    """Whether a TorchScript module's `forward` is declared to return a dict of tensors."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    forward: Any = module.forward
    (returned,) = forward.schema.returns
    return str(returned.type) == "Dict[str, Tensor]"


def _for_energies(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out the options of `TorchMliap.from_energy` that are set."""
    found = {name: options.pop(name, None) for name in ("example", *_common.PACKAGE_FLAGS)}
    return {name: value for name, value in found.items() if value is not False}


def _refuse(title: object, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(
                f"torchcall: {title}: {name}: expected None, because the model fixes it, got "
                f"{value!r}"
            )
