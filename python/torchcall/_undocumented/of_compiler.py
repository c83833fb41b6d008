"""Names of torch's compiler. The import takes seconds: only what compiles models needs it."""

import contextlib
import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch._dynamo.source import LocalSource
from torch._inductor import aot_compile, aoti_load_package, config
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.package.package import load_package, package_aoti
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo

__all__ = [
    "CppCompileError",
    "CppKernel",
    "InvalidCxxCompiler",
    "LocalSource",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "V",
    "aot_compile",
    "aoti_load_package",
    "cache_dir",
    "load_package",
    "package_aoti",
    "pick_vec_isa",
    "supported_vec_isa_list",
    "x86_isa_checker",
]

# For `replaced`. A torch without one works, more slowly.
VALID_INSTRUCTIONS = "torch._inductor.cpu_vec_isa.valid_vec_isa_list"
BUILDER = "torch._inductor.codecache.CppBuilder"
STRIDE = "torch._inductor.codegen.cpp.stride_at_vec_range"

# For `patched`.
OBLIVIOUS_OF_SIZES = "torch.fx.experimental._config.backed_size_oblivious"
FAKE_TENSOR_CACHE = "torch._dynamo.config.fake_tensor_cache_enabled"


def has_own_instructions() -> bool:
    """Whether the user told torch which vector instructions there are."""
    return config.cpp.vec_isa_ok is not None


def found(name: str) -> Any:
    """What torch has under a name, None if it has none."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last, None)


@contextlib.contextmanager
def replaced(name: str, value: object) -> Iterator[None]:
    """Puts something else in the place of what torch has under a name, and restores that."""
    own = found(name)
    module, _, last = name.rpartition(".")
    home = importlib.import_module(module)
    setattr(home, last, value)
    try:
        yield
    finally:
        setattr(home, last, own)


def patched(name: str, value: object) -> AbstractContextManager[Any]:
    """Changes one of torch's settings, and restores it."""
    module, _, last = name.rpartition(".")
    settings: Any = importlib.import_module(module)
    return settings.patch(**{last: value})
