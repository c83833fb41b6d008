"""Names of torch: of private modules, and private attributes. Those of its compiler: `of_compiler`.

The imports cost nothing: `import torch` has loaded these modules.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C import ScriptMethod
from torch._C import _create_function_from_graph as function_of_graph
from torch._C import _current_graph_task_id as current_graph_task_id
from torch._guards import detect_fake_mode
from torch._ops import OperatorBase, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.jit import optimized_execution  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
    treespec_loads,
)

__all__ = [
    "Dropout",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "OperatorBase",
    "ScriptMethod",
    "TorchDispatchMode",
    "current_dispatch_mode",
    "current_graph_task_id",
    "detect_fake_mode",
    "disable_current_modes",
    "function_of_graph",
    "keystr",
    "optimized_execution",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_structure",
    "tree_unflatten",
    "treespec_loads",
]

# Attributes of modules: dicts by name. Of hooks, these run in a call.
PARAMETERS = "_parameters"
BUFFERS = "_buffers"
MODULES = "_modules"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# The module that `torch.compile` wrapped, an attribute of what it returns.
COMPILED = "_orig_mod"

# Functions that check whether the processor has vector instructions, by torch's names of these.
_ISA_CHECKS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}

# A file that torch copies into the source of every package.
PACKAGE_INTERFACE = Path(torch.__file__).parent / "_inductor/codegen/aoti_runtime/interface.cpp"

unsafe_view = torch.ops.aten._unsafe_view.default


class Movable(torch.nn.Module):
    """A module that learns when its tensors are moved or converted."""

    def moved(self) -> None:
        """Called before that."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Movable":
        self.moved()
        return super()._apply(fn, recurse)


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` wrapped; any other as it is."""
    return getattr(module, COMPILED, module)


def cpp_module(module: torch.jit.ScriptModule) -> Any:
    """The C++ module of a script module."""
    return module._c


def python_class(module: torch.jit.ScriptModule) -> Any:
    """The class that a module was scripted from in this process, else None."""
    return getattr(getattr(module, "_concrete_type", None), "py_class", None)


def python_function(function: Any) -> Any:
    """The Python function that a script function came from, where torch keeps it, else None."""
    return getattr(function, "_torchdynamo_inline", None)


def write_count(tensor: torch.Tensor) -> int:
    """A number that grows with each write to the tensor in place."""
    return tensor._version


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor shares the memory of another one for autograd."""
    return tensor._is_view()


def address(storage: torch.UntypedStorage) -> int:
    """The address of a storage, the same for all tensors in it."""
    return storage._cdata


def schema(operator: OpOverload) -> Any:
    """An operator's arguments and results."""
    return operator._schema


def trace_fake(function: Callable[..., Any], fakes: Any, **options: Any) -> torch.fx.GraphModule:
    """Traces a function of fake tensors into a graph of operators. It may use other tensors."""
    # "real" leaves the tensors unchanged; they are fake already.
    trace = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True, **options)
    return trace(*fakes)


def processor_has(instructions: str) -> bool:
    """Whether the processor has these vector instructions; True for a name that is unknown."""
    check = getattr(torch.cpu, _ISA_CHECKS.get(instructions, ""), None)
    return True if check is None else bool(check())


def enable_amx() -> bool:
    """Whether the system lets this process use AMX instructions."""
    return bool(torch.cpu._init_amx())


def is_compiler_loaded() -> bool:
    """Whether `torch.compile` may have been used. The import takes seconds."""
    return "torch._dynamo" in sys.modules


def compiler_settings() -> Any:
    """The settings of `torch.compile`, whose import takes seconds."""
    import torch._dynamo.config

    return torch._dynamo.config


# Builds of torch without CUDA lack these.
def clear_cublas_workspaces() -> None:
    """Frees the memory that cuBLAS got for each stream."""
    torch._C._cuda_clearCublasWorkspaces()


def remove_pool(device: int, pool: Any) -> None:
    """Ends a capture's use of a pool of memory."""
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)
