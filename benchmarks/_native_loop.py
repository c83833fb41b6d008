"""The floor of the benchmarks: `Module::forward`, or a package's run, in a C++ loop.

`native_loop.cc` is compiled at the first use, into `build/native_loop/`. It needs a C++ compiler:
the one that `CXX` names, else `c++`.
"""

import ctypes
import functools
import hashlib
import io
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

_SOURCE = Path(__file__).with_name("native_loop.cc")
_BUILT = _SOURCE.parents[1] / "build" / "native_loop"
_ERROR_SIZE = 8192


def script_loop(
    module: Any, tensors: Sequence[Any], *, requires_grad: bool
) -> Callable[[int], float]:
    """`run(calls)`: seconds for that many calls of a copy of the module.

    Args:
        module: A TorchScript module; its weights are copied to the CPU.
        tensors: Its positional arguments, pytrees of tensors that need no cast.
        requires_grad: Whether gradients are recorded, as in a wrapper with this option.
    """
    archive = _archive(tuple(tensors))
    return _runs("script_loop", _address(module), archive, len(archive), requires_grad)


def package_loop(path: str | os.PathLike[str], tensors: Sequence[Any]) -> Callable[[int], float]:
    """`run(calls)`: seconds for that many runs of an AOTInductor package on the CPU.

    Args:
        path: The package.
        tensors: Its positional arguments, pytrees of tensors that need no cast.
    """
    package: Any = torch._inductor.aoti_load_package(str(path))
    spec = pytree.treespec_loads(package.loader.get_call_spec()[0])
    flat = [leaf.contiguous() for leaf in spec.flatten_up_to((tuple(tensors), {}))]
    archive = _archive(flat)
    return _runs("package_loop", os.fsencode(path), archive, len(archive))


class _Arguments(torch.nn.Module):
    """Carries arguments into C++, types included."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self) -> None:
        """Nothing: C++ reads the attribute."""
        return


def _archive(arguments: Any) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(_Arguments(arguments)), file)
    return file.getvalue()


def _address(module: Any) -> int:
    """That of a ScriptModule's torch::jit::Module, by pybind11's conduit protocol."""
    python, name = ctypes.pythonapi, b"St9type_info"
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    wanted = python.PyCapsule_New(_library().module_type(), name, None)
    abi = b"system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1"
    found = module._c._pybind11_conduit_v1_(abi, wanted, b"raw_pointer_ephemeral")
    if found is None:
        raise RuntimeError("torchcall: benchmarks: torch and this compiler have different C++ ABIs")
    python.PyCapsule_GetName.restype = ctypes.c_char_p
    python.PyCapsule_GetName.argtypes = (ctypes.py_object,)
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = ctypes.py_object, ctypes.c_char_p
    return python.PyCapsule_GetPointer(found, python.PyCapsule_GetName(found))


def _runs(opener: str, *arguments: Any) -> Callable[[int], float]:
    """The loop that one of the library's functions opens."""
    library, error = _library(), ctypes.create_string_buffer(_ERROR_SIZE)
    loop = ctypes.c_void_p(getattr(library, opener)(*arguments, error, _ERROR_SIZE))
    if not loop:
        raise RuntimeError(f"torchcall: {opener}: {error.value.decode()}")

    def run(calls: int) -> float:
        seconds = library.run_loop(loop, calls, error, _ERROR_SIZE)
        if seconds < 0:
            raise RuntimeError(f"torchcall: {opener}: {error.value.decode()}")
        return seconds

    weakref.finalize(run, library.release_loop, loop).atexit = False
    return run


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    text, size, pointer = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("module_type", pointer, ()),
        ("script_loop", pointer, (pointer, text, size, ctypes.c_bool, text, size)),
        ("package_loop", pointer, (text, text, size, text, size)),
        ("run_loop", ctypes.c_double, (pointer, ctypes.c_int64, text, size)),
        ("release_loop", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiled() -> Path:
    """The library; compiled where this source, torch and compiler have none yet."""
    torch_folder = Path(torch.__file__).parent
    command = [
        *os.environ.get("CXX", "c++").split(),
        *("-std=c++20", "-O2", "-fPIC", "-shared", str(_SOURCE)),
        *("-isystem", str(torch_folder / "include")),
        *("-isystem", str(torch_folder / "include/torch/csrc/api/include")),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    key = _SOURCE.read_bytes() + repr((command, torch.__version__)).encode()
    library = _BUILT / f"{hashlib.blake2b(key, digest_size=8).hexdigest()}.so"
    if library.exists():
        return library
    print("compiling benchmarks/native_loop.cc (once, about half a minute)", flush=True)
    _BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
        made = Path(folder) / library.name
        try:
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
        except FileNotFoundError as missing:
            raise RuntimeError(
                f"torchcall: benchmarks: expected a C++ compiler, found no {command[0]}; set CXX"
            ) from missing
        except subprocess.CalledProcessError as failed:
            raise RuntimeError(f"torchcall: benchmarks: {failed.stderr[-2000:]}") from failed
        made.replace(library)
    return library
