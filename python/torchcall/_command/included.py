"""The files that come with torchcall: argon's structure and potential."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchcall._command.parsing import CommandError

if TYPE_CHECKING:
    from torchcall.mliap import TorchMliap


def included_file(name: str) -> Path:
    """The path of an included example: beside the installed extension, or in the repository.

    Raises:
        CommandError: If there is no such file.
    """
    from torchcall import _bridge

    roots = [Path(_bridge.__file__).parent, Path(__file__).resolve().parents[3]]
    folders = [root / "examples" for root in roots]
    for folder in folders:
        if (path := folder / name).is_file():
            return path
    searched = ", ".join(map(str, folders))
    raise CommandError(f"the included file {name} was not found in {searched}; reinstall torchcall")


def load_example(name: str) -> ModuleType:
    """Imports an included example."""
    import importlib.util

    path = included_file(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"torchcall_examples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def argon_module(cutoff: float | None = None) -> Any:
    """The included Lennard-Jones argon, in TorchScript, with cell gradients.

    Args:
        cutoff: In Å; None: 8.5.
    """
    import torch

    lennard_jones = load_example("lennard_jones").LennardJones
    with quiet_torchscript():
        module = lennard_jones(
            **({} if cutoff is None else {"cutoff": cutoff}), cell_gradients=True
        )
        return torch.jit.script(module.eval())


def argon(cutoff: float | None = None, **options: Any) -> "TorchMliap":
    """`argon_module` as a potential; options are those of `torchcall.models.load`."""
    import torchcall

    options |= {"kind": "own", "verbose": False, "requires_grad": False}
    return torchcall.models.load(argon_module(cutoff), **options)


@contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Silences torch's deprecation warnings for TorchScript, the format of deployed models."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        yield
