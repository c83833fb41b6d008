"""A call of an AOTInductor package: its flat arguments and results, told apart by its call spec."""

from typing import Any

import jax
import torch.utils._pytree as torch_pytree

from torchcall._call import Call, IndexCheck
from torchcall._specs import describe
from torchcall._tree import NONE, TENSOR, TUPLE, Node

# Which operands of a potential's package are indices, and into the rows of which they point.
_INDICES = (("edge_index", "pos"), ("batch", "cell"))


class PackageCall:
    """A call whose every shape and dtype is compared with what the package was compiled for.

    A package that `torchcall.compile` made says what that is; of any other, the checks compiled
    into it are all there is, and its inputs are copied, for it may write to them.

    Args:
        call_spec: two lines, torch's pytrees of the arguments and of the results.
        metadata: what `torchcall.compile` wrote, None for a package of another origin.
        device: what it was compiled for.
        call: what goes in.

    Raises:
        ValueError: an argument is not what the package takes.
    """

    def __init__(
        self, call_spec: str, metadata: dict[str, Any] | None, device: str, call: Call
    ) -> None:
        self._metadata = metadata
        self.device: str | None = device
        self._call = call
        arguments, self._results = (_skeleton(line) for line in call_spec.splitlines())
        position = {leaf: k for k, leaf in enumerate(call.arrays)}
        leaves = jax.tree.unflatten(call.treedef, range(len(call.specs)))
        pairs: list[tuple[int, int]] = []
        for name, skeleton, given in zip(("args", "kwargs"), arguments, leaves, strict=True):
            _match(skeleton, given, f"operand {name}", pairs)
        for _, leaf in pairs:
            got = call.specs[leaf]
            if leaf in position or (metadata is None and got is None):
                continue
            foreign = ", or None for a scalar, which is compiled into the package"
            expected = "an array" + (foreign if metadata is None else "")
            raise ValueError(f"{call.names[leaf]}: expected {expected}, got {got!r}")
        order = [position[leaf] for _, leaf in sorted(pairs) if leaf in position]
        self.arguments: list[Node] = [(TUPLE, len(order)), *((TENSOR, k) for k in order)]
        self.copies = [metadata is None] * len(order)
        self.index_checks: list[IndexCheck] = []
        self._axes: dict[str, int] = {}
        if metadata is not None:
            # By the key of the package's one argument, an AtomGraphInput.
            operands = dict(zip((row[0] for row in metadata["inputs"]), order, strict=True))
            for (_, dtype, shape), k in zip(metadata["inputs"], order, strict=True):
                self._check(call.arrays[k], dtype, shape)
            self.index_checks = [IndexCheck(operands[key], operands[of]) for key, of in _INDICES]
            if metadata["species"]:
                bits = sum(1 << number for number in metadata["species"])
                allowed = (bits & (2**64 - 1), bits >> 64)
                self.index_checks.append(IndexCheck(operands["atomic_numbers"], -1, allowed))

    def infer_outputs(self) -> Any:
        """What the package says that it returns.

        Raises:
            ValueError: it says nothing.
        """
        if self._metadata is None:
            raise ValueError(
                "output_spec: expected a pytree of jax.ShapeDtypeStruct, got None: a package that "
                "torchcall.compile did not make does not tell its outputs' shapes"
            )
        return {
            name: jax.ShapeDtypeStruct(tuple(self._axes.get(n, n) for n in shape), dtype)
            for name, dtype, shape in self._metadata["outputs"]
        }

    def results(self, outputs: Any) -> list[Node]:
        """The package's results in its order, None for those that nobody asks for."""
        leaves, treedef = jax.tree.flatten(outputs)
        pairs: list[tuple[int, int]] = []
        slots = jax.tree.unflatten(treedef, range(len(leaves)))
        _match(self._results, slots, "output ", pairs, selects=self._call.selects_outputs)
        wanted = dict(pairs)
        n_results = len(torch_pytree.tree_leaves(self._results))
        nodes: list[Node] = [
            (TENSOR, wanted[i]) if i in wanted else (NONE, None) for i in range(n_results)
        ]
        return [(TUPLE, n_results), *nodes]

    def callable(self, outputs: Any, n_lengths: int) -> None:
        """None: no Python runs."""
        del outputs, n_lengths

    def _check(self, leaf: int, dtype: str, shape: list[Any]) -> None:
        """Compares an operand with what the package was compiled for, and notes its axes' sizes."""
        assert self._metadata is not None
        name, spec = self._call.names[leaf], self._call.specs[leaf]
        got_dtype = jax.numpy.dtype(self._call.casts[leaf] or spec.dtype)
        got = jax.ShapeDtypeStruct(spec.shape, got_dtype)
        expected = f"{dtype} ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        if str(got.dtype) != dtype:
            raise ValueError(
                f"{name}: expected {expected}, got {describe(got)}; input_spec casts inside torch"
            )
        if len(got.shape) != len(shape):
            raise ValueError(f"{name}: expected {expected}, got {describe(got)}")
        capacity = self._metadata["capacity"] or {}
        for axis, size in zip(shape, got.shape, strict=True):
            wanted: Any = self._axes.get(axis, capacity.get(axis, axis))
            if isinstance(axis, str):
                least = self._metadata["minimum"][axis]
                if size < least:
                    raise ValueError(
                        f"{name}: expected {expected} with {axis} >= {least}, got {describe(got)}"
                    )
                if wanted == axis:
                    wanted = size
                self._axes[axis] = wanted
            if size != wanted:
                where = f" with {axis} = {wanted}" if isinstance(axis, str) else ""
                why = ", the capacity that the package was compiled for" * (axis in capacity)
                raise ValueError(f"{name}: expected {expected}{where}{why}, got {describe(got)}")


def _skeleton(line: str) -> Any:
    """A call spec's pytree with its leaves' positions at its leaves."""
    spec = torch_pytree.treespec_loads(line)
    return torch_pytree.tree_unflatten(range(spec.num_leaves), spec)


def _match(
    skeleton: Any, given: Any, path: str, pairs: list[tuple[int, int]], *, selects: bool = False
) -> None:
    """Pairs the package's leaves with the caller's.

    Raises:
        ValueError: their structures differ.
    """
    if isinstance(skeleton, dict):
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected a dict, got {_kind(given)}")
        missing = [key for key in (given if selects else skeleton) if key not in skeleton]
        missing += [key for key in skeleton if key not in given and not selects]
        if missing or (not selects and len(given) != len(skeleton)):
            raise ValueError(
                f"{path}: expected the keys {sorted(skeleton, key=str)} (from the package), "
                f"got {sorted(given, key=str)}"
            )
        for key in given:
            _match(skeleton[key], given[key], f"{path}[{key!r}]", pairs, selects=selects)
    elif isinstance(skeleton, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(skeleton):
            raise ValueError(
                f"{path}: expected {len(skeleton)} entries (from the package), got {_kind(given)}"
            )
        for i, (part, value) in enumerate(zip(skeleton, given, strict=True)):
            _match(part, value, f"{path}[{i}]", pairs, selects=selects)
    elif isinstance(given, int):
        pairs.append((skeleton, given))
    else:
        raise ValueError(f"{path}: expected an array (from the package), got {_kind(given)}")


def _kind(given: Any) -> str:
    if isinstance(given, int):
        return "an array or a scalar"
    if isinstance(given, list | tuple):
        return f"{len(given)} entries"
    return type(given).__name__
