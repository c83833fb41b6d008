"""`torchcall.models.load`: recognises the network of a source and loads it."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torchcall._engines.archive import check_checksums
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap import TorchMliap
from torchcall.mliap._compile._example import checked_dtype
from torchcall.models import chgnet, mace, nequip, own, sevennet
from torchcall.models._common import PACKAGE_FLAGS, checked_device, report
from torchcall.models._packages import from_record, record_of, write_record

# `own` last: it takes what no network recognises.
_NETWORKS: dict[str, ModuleType] = {
    "chgnet": chgnet,
    "mace": mace,
    "nequip": nequip,
    "sevennet": sevennet,
    "own": own,
}

# Parameters of every network's `load` that the network itself does not interpret.
_COMMON = {"source", "dtype", "engine", "device", "verbose", "options"}

# What networks and torch raise for files that are damaged or of another kind.
_UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def load(
    source: str | Path | Callable[..., Any],
    *,
    kind: str = "auto",
    dtype: Any = None,
    engine: Literal["auto", "eager", "script", "package"] = "auto",
    device: Any = None,
    **options: Any,
) -> TorchMliap:
    """Loads a potential and reports on stderr what it recognised.

    A checkpoint that is a pickle runs the code that it names when it is loaded, as with
    `torch.load`. Load only files from sources that you trust. The network is recognised without
    running anything.

    Args:
        source: the name of a pretrained model, the path of a file, or a module. Pretrained weights
            are read from the network's installed package; nothing is downloaded.
        kind: "auto" recognises the network; or its name, as in `torchcall.models`; "own" for a
            module or file with the interface of `TorchMliap.from_module` or `from_energy`.
        dtype: float32 or float64, for weights and arithmetic. None: that of the weights.
        engine: "eager" runs the module in Python. "script" converts it to TorchScript. "package"
            compiles it, which takes up to some minutes the first time; packages are cached. "auto"
            is "script" if the network supports it, else "eager".
        device: "cpu" or "cuda", for packages. None: that of JAX's default backend.
        **options: `verbose=False` to report nothing; options of the network, see its module; for
            packages, `example`, `second_derivatives` and `parallel` of `TorchMliap.from_energy`;
            options of `TorchModuleWrapper`.

    Returns:
        The potential, with its cutoff and species.

    Raises:
        ValueError: nothing recognises the source, or an option has a wrong value.
        TypeError: the source has a wrong type, or the network does not have an option.
        FileNotFoundError: the file does not exist.
        ImportError: the network's package is missing. The message names the extra to install.
    """
    if isinstance(source, Path) and not source.exists():
        source = str(source)  # perhaps the name of a pretrained model
    kind = _kind_of(source) if kind == "auto" else _checked(kind)
    floats = checked_dtype(dtype, "torchcall: models.load")
    network = _NETWORKS[kind]
    if network is own and isinstance(source, str | Path):
        own.check_file(source)  # first: a damaged checkpoint has options that are not of `own`
    _check_options(kind, network, options)
    record = None
    if engine == "package" and "example" not in options:
        names = set(inspect.signature(network.load).parameters) - _COMMON | set(PACKAGE_FLAGS)
        own_options = {name: options[name] for name in sorted(names & set(options))}
        others = {name: value for name, value in options.items() if name not in names}
        verbose = others.pop("verbose", True)
        own_options |= {"dtype": str(floats), "device": checked_device(device)}
        record = record_of(network, source, own_options)
        model = record and from_record(record, others)
        if model:
            if verbose:
                report(model, f"{kind}: {source}")
            return model
    if network is not own and isinstance(source, str | Path) and Path(source).is_file():
        check_checksums(Path(source), f"a model for kind={kind!r}")
    try:
        model = network.load(source, dtype=dtype, engine=engine, device=device, **options)
    except _UNREADABLE as error:
        if "torchcall:" in str(error) or not isinstance(source, str | Path):
            raise
        raise ValueError(
            f"torchcall: {source}: expected a model for kind={kind!r}, got one that does not load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if record:
        write_record(record, model.wrapper._source.path)
    return model


def _check_options(kind: str, network: ModuleType, options: dict[str, Any]) -> None:
    """Raises TypeError for an option that neither the network nor the wrapper has."""
    own_options = set(inspect.signature(network.load).parameters) - {"options"}
    wrapper_options = set(inspect.signature(TorchModuleWrapper).parameters)
    known = own_options | wrapper_options | {"narrow", "example", *PACKAGE_FLAGS}
    for name in options:
        if name not in known:
            listed = ", ".join(sorted(own_options - _COMMON)) or "none of its own"
            raise TypeError(
                f"torchcall: models.load: {name}: expected an option of kind={kind!r} ({listed}) "
                "or of TorchModuleWrapper, got an unknown one"
            )


def _kind_of(source: object) -> str:
    if isinstance(source, str | Path) and Path(source).is_dir():
        raise IsADirectoryError(
            f"torchcall: models.load: expected a file or a name, got the directory {str(source)!r}"
        )
    if isinstance(source, str | Path) and not Path(source).exists():
        _check_name(source)
    for kind, network in _NETWORKS.items():
        if network.recognises(source):
            return kind
    got = f"{source!s}" if isinstance(source, str | Path) else f"a {type(source).__name__}"
    raise ValueError(
        f"torchcall: models.load: expected the model of a known network, got {got}; "
        f"name its kind: {', '.join(_NETWORKS)}"
    )


def _check_name(source: str | Path) -> None:
    """Refuses a name that is neither a pretrained model nor a file."""
    names = [name for network in _NETWORKS.values() for name in network.NAMES]
    if any(network.recognises(source) for network in _NETWORKS.values()):
        return
    raise FileNotFoundError(
        f"torchcall: models.load: expected a file or one of {', '.join(names)}; got {str(source)!r}"
    )


def _checked(kind: object) -> str:
    if kind not in _NETWORKS:
        raise ValueError(
            f"torchcall: models.load: kind: expected 'auto' or one of {', '.join(_NETWORKS)}, "
            f"got {kind!r}"
        )
    return str(kind)
