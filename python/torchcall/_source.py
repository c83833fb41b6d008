"""Where models come from: live TorchScript objects and files."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch

from torchcall import _bridge


class ModelSource(Protocol):
    """Something that a native model can be made from, again and again."""

    name: str
    weights: str  # "shared" with the caller's module, "copied" from it, or "own"

    @property
    def path(self) -> Path | None:
        """The file, where there is one."""
        ...

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        ...

    def python_module(self, model: _bridge.Model) -> Any:
        """What `load` returned last, as a Python callable, to follow with fake tensors."""
        ...


class LiveSource:
    """A `ScriptModule` or script function of this process, reached without serialising it."""

    path = None

    def __init__(self, module: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> None:
        self._module = module
        self.weights = "shared"
        if isinstance(module, torch.jit.ScriptModule):
            self.name = str(getattr(module, "original_name", type(module).__name__))
        else:
            self.name = str(module.name)

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        cpp = self._module._c if isinstance(self._module, torch.jit.ScriptModule) else self._module
        native = _bridge.Model.from_live(cpp, freeze, requires_grad)
        if native is not None:
            return native
        self.weights = "copied"
        buffer = io.BytesIO()
        torch.jit.save(self._module, buffer)
        return _bridge.Model.from_bytes(buffer.getvalue(), freeze, requires_grad)

    def python_module(self, model: _bridge.Model) -> Any:
        del model
        return self._module


class FileSource:
    """A TorchScript archive, loaded in C++."""

    def __init__(self, path: Path) -> None:
        _check_archive(path)
        self._path = path.resolve()
        self.weights = "own"
        self.name = path.name

    @property
    def path(self) -> Path | None:
        return self._path

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        _check_archive(self._path)
        try:
            return _bridge.Model.from_file(str(self._path), freeze, requires_grad)
        except ValueError as error:
            raise ValueError(f"the TorchScript archive does not load: {error}") from error

    def python_module(self, model: _bridge.Model) -> Any:
        # Not from the file, which may have changed or gone since.
        return torch.jit.load(io.BytesIO(model.serialize()), map_location="cpu")


def source_of(module: object) -> ModelSource:
    """Returns the source for what a user passed as a model.

    Raises:
        TypeError: if it is nothing that can be called without Python.
        FileNotFoundError, ValueError: if it is a path to no usable archive.
    """
    if isinstance(module, str | Path):
        return FileSource(Path(module))
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return LiveSource(module)
    expected = "expected a torch.jit.ScriptModule, a script function or a path to an archive"
    if isinstance(module, torch.nn.Module):
        raise TypeError(
            f"torchcall: {type(module).__name__}: {expected}, got an eager torch.nn.Module, which "
            "this version cannot call; pass torch.jit.script(module)"
        )
    raise TypeError(f"torchcall: model: {expected}, got {type(module).__name__}")


def _check_archive(path: Path) -> None:
    def refuse(got: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"torchcall: {path}: expected a TorchScript archive, got {got}")

    try:
        path.stat()
    except FileNotFoundError as error:
        raise refuse("no such file", FileNotFoundError) from error
    except OSError as error:
        raise refuse(f"a path that cannot be read: {error.strerror}", type(error)) from error
    if path.is_dir():
        raise refuse("a directory", IsADirectoryError)
    if not path.is_file():
        raise refuse("something that is no regular file")
    if path.stat().st_size == 0:
        raise refuse("an empty file")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                raise _pickled(path)
        raise refuse("a file that is no zip archive; it may be damaged or of another kind")
    try:
        with zipfile.ZipFile(path) as archive:
            # An archive keeps everything under one folder of any name.
            entries = {name.partition("/")[2] for name in archive.namelist()}
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        raise refuse(f"a damaged file: {error}") from error
    if damaged is not None:
        raise refuse(f"a damaged file: the checksum of its entry {damaged} is wrong")
    if "constants.pkl" in entries:
        return
    if any("aotinductor" in entry for entry in entries):
        raise refuse("an AOTInductor package (.pt2), which this version cannot call")
    if "data.pkl" in entries:
        raise _pickled(path)
    raise refuse("a zip archive of another kind")


class PickledModelError(ValueError):
    """A pickled model was refused."""


def _pickled(path: Path) -> PickledModelError:
    return PickledModelError(
        f"torchcall: {path}: expected a TorchScript archive, got a pickle (made by torch.save). "
        "Unpickling runs whatever code the file names, so torchcall does not do it: save the model "
        "with torch.jit.script(model).save(path), or, if you trust the file, pass allow_pickle=True"
    )


def unpickle(path: Path) -> object:
    """Loads a pickled model, running whatever code it names.

    Raises:
        TypeError: if the pickle holds no module.
        ValueError: if it does not unpickle, whatever the code that it names raised.
    """
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ValueError(
            f"torchcall: {path}: expected a pickled module, got a pickle that does not load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, torch.nn.Module | torch.jit.ScriptFunction):
        raise TypeError(
            f"torchcall: {path}: expected a pickled module, got {type(module).__name__}; a state "
            "dict has weights but no code"
        )
    return module
