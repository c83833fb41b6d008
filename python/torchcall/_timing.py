"""The floor that a call is compared with: the model's own `forward` in a C++ loop."""

from typing import Any

import jax
import numpy as np

from torchcall._call.specs import is_static
from torchcall._wrapper import TorchModuleWrapper


def time_native(wrapper: TorchModuleWrapper, *args: Any, iterations: int, **kwargs: Any) -> float:
    """Seconds per call of `Module::forward` on these arguments, with no XLA and no plan.

    The inputs are torch tensors that already have the dtypes which the model gets; the loop is
    warmed up, runs in C++ without the GIL, and in the grad mode that the wrapper's calls have.

    Args:
        wrapper: the wrapped model.
        *args, **kwargs: concrete arguments as for a call.
        iterations: how many calls are timed.
    """
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=lambda x: x is None)
    prepared = wrapper._prepare(args, kwargs, leaves, treedef)
    arrays = [np.asarray(jax.numpy.asarray(leaf)) for leaf in leaves if not is_static(leaf)]
    addresses = [array.ctypes.data for array in arrays]
    return prepared.plan.time_forward(addresses, iterations) / iterations
