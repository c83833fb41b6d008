"""A call of an AOTInductor package: its arguments compared with the package's, and its results."""

from typing import Any

import jax

from torchcall._call.call import Call, CompiledDerivative, IndexCheck
from torchcall._call.plan import PlanSpec
from torchcall._call.specs import describe, is_symbolic
from torchcall._call.tree import INT, LIST, NONE, STRING, TENSOR, TUPLE, Node
from torchcall._engines.package_file import is_float
from torchcall._undocumented.of_torch import tree_leaves, tree_map, tree_unflatten, treespec_loads

_MODULE = "wrap the module itself (TorchScript or eager)"
_FOREIGN = (
    "torchcall did not make the package, so it has no gradients that JAX could use; "
    f"{_MODULE}, or return the gradients from the model and use jax.custom_vjp"
)
_WITHOUT_GRADIENTS = (
    "the package was compiled without gradients; compile it again with torchcall.compile(..., "
    "gradients=True), or a potential with torchcall.mliap.compile(..., second_derivatives=True), "
    f"or {_MODULE}"
)
_ONE_DERIVATIVE = (
    "the package's outputs have one derivative (so a potential's package has second derivatives of "
    "the energy, not further ones), in reverse mode (jax.grad, jax.vjp, jax.jacrev), and in "
    "forward mode where the one output is a single number; for other derivatives "
    f'{_MODULE}; for a potential engine="script" or "eager"'
)


class PackageCall:
    """A call of a package. Its shapes and dtypes are compared with the package's metadata.

    A package that torchcall did not make has no such metadata. It relies on the checks compiled
    into it, and gets copies of its inputs, because it may write to them.

    Args:
        call_spec: two lines: torch's pytrees of the arguments and of the results.
        metadata: torchcall's metadata, None for a package of another origin.
        device: the kind of device that the package was compiled for.
        call: the call's arguments.

    Raises:
        ValueError: an argument does not match the package.
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
            scalars = ", or None for a scalar, which is compiled into the package"
            expected = "an array" + (scalars if metadata is None else "")
            raise ValueError(f"{call.names[leaf]}: expected {expected}, got {got!r}")
        order = [position[leaf] for _, leaf in sorted(pairs) if leaf in position]
        self.arguments: list[Node] = [(TUPLE, len(order)), *((TENSOR, k) for k in order)]
        self.copies = [metadata is None] * len(order)
        self.index_checks: list[IndexCheck] = []
        self._axes: dict[str, int] = {}
        self.parameters: list[list[str]] = []
        self.derivative: CompiledDerivative | None = None
        self.no_derivatives = _FOREIGN
        if metadata is not None:
            self._check_operands(metadata, order)
            has_gradients = bool(metadata.get("gradients"))
            self.no_derivatives = "" if has_gradients else _WITHOUT_GRADIENTS
            if has_gradients:
                self.derivative = _derivative(metadata, order)

    def infer_outputs(self, change: Any = None) -> Any:
        """The outputs according to the package's metadata.

        Raises:
            ValueError: the package has no metadata.
        """
        del change  # a package is not traced
        if self._metadata is None:
            raise ValueError(
                "output_spec: expected a pytree of jax.ShapeDtypeStruct, got None: a package that "
                "torchcall.compile did not make does not state its outputs' shapes"
            )
        rows = self._metadata["outputs"]
        specs = [
            jax.ShapeDtypeStruct(tuple(self._axes.get(n, n) for n in row["shape"]), row["dtype"])
            for row in rows
        ]
        return tree_map(lambda position: specs[position], self._results)

    def results(self, outputs: Any) -> list[Node]:
        """The package's results in its order; None for those that `outputs` does not contain."""
        leaves, treedef = jax.tree.flatten(outputs)
        pairs: list[tuple[int, int]] = []
        slots = jax.tree.unflatten(treedef, range(len(leaves)))
        _match(self._results, slots, "output ", pairs, selects=self._call.selects_outputs)
        wanted = dict(pairs)
        n_results = len(tree_leaves(self._results))
        nodes: list[Node] = [
            (TENSOR, wanted[i]) if i in wanted else (NONE, None) for i in range(n_results)
        ]
        return [(TUPLE, n_results), *nodes]

    def eager_runner(self, outputs: Any, n_lengths: int) -> None:
        """None: calls run no Python."""
        del outputs, n_lengths

    def _check_operands(self, metadata: dict[str, Any], order: list[int]) -> None:
        """Compares all operands with the metadata. Collects the range checks for each call."""
        rows = metadata["inputs"]
        operands = dict(zip((row["name"] for row in rows), order, strict=True))
        sizes = _Sizes(metadata["axes"])
        for row, k in zip(rows, order, strict=True):
            leaf = self._call.arrays[k]
            spec = self._call.specs[leaf]
            dtype = jax.numpy.dtype(self._call.casts[leaf] or spec.dtype)
            got = jax.ShapeDtypeStruct(spec.shape, dtype)
            sizes.check(self._call.names[leaf], got, row)
            if "rows_of" in row:
                self.index_checks.append(IndexCheck(k, operands[row["rows_of"]]))
            if "members" in row:
                self.index_checks.append(IndexCheck.members(k, row["members"]))
        self._axes = sizes.known


class _Sizes:
    """Compares operands with a package's metadata, and collects the sizes of its named axes.

    Args:
        axes: the metadata of the named axes.
    """

    def __init__(self, axes: dict[str, dict[str, Any]]) -> None:
        self._axes = axes
        self.known: dict[str, int] = {}

    def check(self, name: str, got: jax.ShapeDtypeStruct, row: dict[str, Any]) -> None:
        """Compares one operand, as the package gets it.

        Raises:
            ValueError: it does not match its `row` of the metadata. Limits of a symbolic size are
                not checked.
        """
        dtype, shape = row["dtype"], row["shape"]
        expected = f"{dtype} ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"

        def refuse(text: str) -> ValueError:
            return ValueError(f"{name}: expected {expected}{text}")

        if str(got.dtype) != dtype:
            raise refuse(f", got {describe(got)}; input_spec casts inside torch")
        if len(got.shape) != len(shape):
            raise refuse(f", got {describe(got)}")
        for size, size_or_name in zip(got.shape, shape, strict=True):
            if not isinstance(size_or_name, str):
                if size != size_or_name:
                    raise refuse(f", got {describe(got)}")
                continue
            axis = self._axes[size_or_name]
            for limit, sign, wrong in (
                ()
                if is_symbolic(size)
                else (
                    ("minimum", ">=", size < axis["minimum"]),
                    ("maximum", "<=", axis["maximum"] is not None and size > axis["maximum"]),
                )
            ):
                if wrong:
                    raise refuse(f" with {size_or_name} {sign} {axis[limit]}, got {describe(got)}")
            capacity = axis["capacity"]
            known = self.known.setdefault(size_or_name, size if capacity is None else capacity)
            if size != known:
                why = ", the capacity that the package was compiled for" * (capacity is not None)
                raise refuse(f" with {size_or_name} = {known}{why}, got {describe(got)}")


def check_sizes(metadata: dict[str, Any] | None, spec: PlanSpec) -> None:
    """Compares the operands of a plan with a package's metadata.

    Raises:
        ValueError: one does not match.
    """
    if metadata is None:  # the package relies on the checks compiled into it
        return
    sizes, inputs = _Sizes(metadata["axes"]), metadata["inputs"]
    # Cotangents follow the inputs. They have the shapes of outputs.
    for row, (_, k) in zip(inputs, spec.arguments[1 : 1 + len(inputs)], strict=True):
        assert isinstance(k, int)
        operand = spec.operands[k]
        dtype = jax.numpy.dtype(operand.cast or operand.dtype)
        sizes.check(operand.name, jax.ShapeDtypeStruct(operand.shape, dtype), row)


def _derivative(metadata: dict[str, Any], order: list[int]) -> CompiledDerivative:
    """The package's second program.

    Args:
        metadata: torchcall's, of a package with gradients.
        order: per input of the package, the operand.
    """
    axes: dict[str, tuple[int, int]] = {}
    for row, operand in zip(metadata["inputs"], order, strict=True):
        for axis, size in enumerate(row["shape"]):
            axes.setdefault(str(size), (operand, axis))

    def zeros(row: dict[str, Any]) -> list[Node]:
        nodes: list[Node] = [(LIST, 1 + len(row["shape"])), (STRING, row["dtype"])]
        for size in row["shape"]:
            if isinstance(size, str):
                operand, axis = axes[size]
                nodes += [(TUPLE, 2), (TENSOR, operand), (INT, axis)]
            else:
                nodes.append((INT, size))
        return nodes

    operands = dict(zip((row["name"] for row in metadata["inputs"]), order, strict=True))
    return CompiledDerivative(
        [
            (result, row["dtype"], zeros(row))
            for result, row in enumerate(metadata["outputs"])
            if is_float(row)
        ],
        [operands[name] for name in metadata["gradients"]],
        _ONE_DERIVATIVE,
    )


def _skeleton(line: str) -> Any:
    """A call spec's pytree. Its leaves are their positions."""
    spec = treespec_loads(line)
    return tree_unflatten(range(spec.num_leaves), spec)


def _match(
    skeleton: Any, given: Any, path: str, pairs: list[tuple[int, int]], *, selects: bool = False
) -> None:
    """Appends to `pairs` the position of each package leaf and of the caller's leaf for it.

    Args:
        skeleton: the package's pytree of positions.
        given: the caller's.
        path: what errors call it.
        pairs: the result.
        selects: whether the caller's dicts may lack keys.

    Raises:
        ValueError: the structures differ.
    """
    name = path.rstrip()
    if isinstance(skeleton, dict):
        if not isinstance(given, dict):
            raise ValueError(f"{name}: expected a dict, got {_kind(given)}")
        missing = [key for key in (given if selects else skeleton) if key not in skeleton]
        missing += [key for key in skeleton if key not in given and not selects]
        if missing or (not selects and len(given) != len(skeleton)):
            raise ValueError(
                f"{name}: expected the keys {sorted(skeleton, key=str)} (from the package), "
                f"got {sorted(given, key=str)}"
            )
        for key in given:
            _match(skeleton[key], given[key], f"{path}[{key!r}]", pairs, selects=selects)
    elif isinstance(skeleton, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(skeleton):
            raise ValueError(
                f"{name}: expected {len(skeleton)} entries (from the package), got {_kind(given)}"
            )
        for i, (part, value) in enumerate(zip(skeleton, given, strict=True)):
            _match(part, value, f"{path}[{i}]", pairs, selects=selects)
    elif isinstance(given, int):
        pairs.append((skeleton, given))
    else:
        raise ValueError(f"{name}: expected an array (from the package), got {_kind(given)}")


def _kind(given: Any) -> str:
    if isinstance(given, int):
        return "an array or a scalar"
    if isinstance(given, list | tuple):
        return f"{len(given)} entries"
    return type(given).__name__
