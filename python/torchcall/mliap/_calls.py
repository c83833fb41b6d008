"""How a potential's module is called: its options, and the rows that it leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from torchcall._call.call import CallOptions, IndexCheck
from torchcall.mliap._input import AtomGraphInput, narrowing

if TYPE_CHECKING:
    from torchcall.mliap._model import TorchMliap


def call_options(
    model: TorchMliap,
    input: AtomGraphInput,
    *lengths: Int[ArrayLike, ""],
    only_gradients: bool = False,
) -> tuple[CallOptions, list[Array]]:
    """Options and lengths of a call.

    Args:
        model: the potential.
        input: what its module gets.
        *lengths: numbers of valid atoms and edges of a padded input. The call is narrowed if they
            are given and the model narrows.
        only_gradients: whether the energies are left out.
    """
    operand = {key: k for k, key in enumerate(sorted(input))}
    outputs = model.output_specs(input)
    gradient_of: tuple[int, ...] = ()
    if only_gradients:
        del outputs["energy"]
        by = {"cell_gradients": operand["cell"], "position_gradients": operand["pos"]}
        gradient_of = tuple(by[key] for key in sorted(outputs))
    narrows = bool(lengths) and model.narrows
    options = CallOptions(
        outputs=outputs,
        narrowing=narrowing(tuple(outputs)) if narrows else None,
        index_checks=_index_checks(operand, model.species),
        reuses_last=model._reuses_last,
        gradient_of=gradient_of,
    )
    return options, [jnp.asarray(n, jnp.int32) for n in lengths] if narrows else []


def _index_checks(
    operand: dict[str, int], species: tuple[int, ...] | None
) -> tuple[IndexCheck, ...]:
    """Checks of the call: edges join atoms, atoms belong to systems, elements are declared."""
    checks = [
        IndexCheck(operand[key], operand[rows])
        for key, rows in (("edge_index", "pos"), ("batch", "cell"))
        if key in operand and rows in operand
    ]
    # The native check supports numbers below 128.
    if species and species[-1] < 128 and "atomic_numbers" in operand:
        checks.append(IndexCheck.members(operand["atomic_numbers"], species))
    return tuple(checks)


def zero_narrowed(rows: Float[Array, "N 3"], n_atoms: Int[Array, ""]) -> Float[Array, "N 3"]:
    """Zero in rows that a narrowed call leaves out. On a CPU, the call itself does this."""
    return jax.lax.platform_dependent(rows, n_atoms, cpu=lambda rows, _: rows, default=_zero_unused)


def _zero_unused(rows: Array, n_atoms: Array) -> Array:
    used = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.maximum(n_atoms + 1, 2)
    return jnp.where(used[:, None], rows, jnp.zeros_like(rows))
