"""Jitted functions of a potential, which do not hold its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array

from torchcall.mliap._model import TorchMliap
from torchcall.mliap._programs import Programs
from torchcall.mliap._table import Table


def model_programs(
    name: str, function: Callable[..., Any]
) -> Callable[[TorchMliap], Callable[..., Any]]:
    """`program_of(model)(model.cutoff.data, *arrays)` is `function(model, *arrays)`, jitted.

    There is one program per wrapper and static fields. It refers to call plans only, not to the
    model, see `Programs`. So the function must not apply rules for derivatives or `vmap` to the
    model: these would refer to it, and thereby JAX's caches.

    Args:
        name: what JAX calls the programs.
        function: of a model and pytrees of arrays.
    """
    programs = Programs()

    def program_of(model: TorchMliap) -> Callable[..., Any]:
        keys = model.cutoff.keys
        nothing: Any = None
        bare = replace(model, wrapper=None, cutoff=nothing)

        def make(wrapper: Callable[[], Any]) -> Callable[..., Any]:
            def program(cutoff: Array, *arrays: Any) -> Any:
                live = replace(bare, wrapper=wrapper(), cutoff=Table(keys, cutoff))
                return function(live, *arrays)

            program.__name__ = program.__qualname__ = name
            return jax.jit(program)

        options = (
            keys, model.compute_cell_gradients, model.narrow, model.capacity, model._reuses_last
        )  # fmt: skip
        return programs.get(model.wrapper, options, make)

    return program_of
