"""Call PyTorch models from JAX-compiled programs: no host round trip, no Python, no GIL."""

from torchcall import _interrupts, _native

_native.load_torch_half()
_interrupts.install()

from torchcall._compile import CompileError, compile  # noqa: E402
from torchcall._doctor import doctor  # noqa: E402
from torchcall._threads import set_num_threads  # noqa: E402
from torchcall._wrapper import TorchModuleWrapper, load  # noqa: E402

__all__ = [
    "CompileError",
    "TorchModuleWrapper",
    "compile",
    "doctor",
    "load",
    "set_num_threads",
]
__version__ = "0.1.0"
