"""The engine for AOTInductor packages (`.pt2`): code compiled for one torch, device and machine."""

import os
import platform
from pathlib import Path
from typing import Any

import jax
import torch
import torch.utils._pytree as torch_pytree

from torchcall import _bridge
from torchcall._call.call import Call, IndexCheck
from torchcall._call.plan import PlanSpec
from torchcall._call.specs import describe, is_symbolic
from torchcall._call.tree import NONE, TENSOR, TUPLE, Node
from torchcall._engines.content import FileContent
from torchcall._engines.package_file import PackageMetadata, read_package, read_sources

# The number of concurrent calls; runners share the weights.
_MAX_RUNNERS = 16

# torch's names for vector instructions, and its functions that check whether a processor has them.
_ISA_CHECKS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}

# A file that torch copies into the source of every package, and a name that occurs only in it.
_INTERFACE = Path(torch.__file__).parent / "_inductor/codegen/aoti_runtime/interface.cpp"
_ENTRY_POINT = "AOTInductorModelContainerCreate("


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
        self.no_derivatives = (
            "an AOTInductor package holds no derivatives: wrap the module itself (TorchScript or "
            "eager), or return the gradients from the model and use jax.custom_vjp"
        )
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
        if metadata is not None:
            self._check_operands(metadata, order)

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
        return torch_pytree.tree_map(lambda position: specs[position], self._results)

    def results(self, outputs: Any) -> list[Node]:
        """The package's results in its order; None for those that `outputs` does not contain."""
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


def _skeleton(line: str) -> Any:
    """A call spec's pytree. Its leaves are their positions."""
    spec = torch_pytree.treespec_loads(line)
    return torch_pytree.tree_unflatten(range(spec.num_leaves), spec)


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


class PackageSource:
    """A package file. Its metadata is read and checked before its code is loaded."""

    engine = "AOTInductor"
    weights = "own"

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._verified: FileContent | None = FileContent(path)  # None after it was loaded
        self._metadata = _checked(path)
        own = self._metadata.torchcall
        self.label = path.stem if own is None else str(own["name"])
        self.name = path.name if own is None else f"{self.label} ({path.name})"

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    @property
    def metadata(self) -> PackageMetadata:
        """The package's metadata."""
        return self._metadata

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Loads the package's code and weights.

        Raises:
            ValueError: it is for another torch, device or machine, or does not load.
        """
        del requires_grad  # gradients are compiled in
        if freeze:
            raise ValueError("freeze=True: expected a TorchScript module, got a package")
        file = self._verified or FileContent(self._path)
        metadata = self._metadata if self._verified else _checked(self._path)
        self._verified = None
        if _signature(metadata) != _signature(self._metadata):
            raise ValueError(
                "refresh: expected a package with the same arguments and results, got another "
                "one; make a new wrapper"
            )
        self._metadata = metadata
        # Packages read this at their first run. It enables the checks compiled into them.
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
        runners = min(os.cpu_count() or 1, _MAX_RUNNERS)
        try:
            model = _bridge.Model.from_package(str(self._path), _home(metadata), runners)
        except ValueError as error:
            raise ValueError(
                f"the package does not load with torch {torch.__version__}; if another torch "
                f"compiled it, compile the model here: {error}"
            ) from error
        file.require_unchanged()
        model.file = file
        return model

    def python_module(self, model: _bridge.Model) -> dict[str, Any]:
        """The section `user` of the package's metadata; empty for packages of another origin."""
        del model
        return {} if self._metadata.torchcall is None else self._metadata.torchcall["user"]

    def prepare_call(self, model: _bridge.Model, call: Call) -> PackageCall:
        """Checks and plans a call."""
        return PackageCall(model.schema, self._metadata.torchcall, self._metadata.device, call)

    def check_sizes(self, spec: PlanSpec) -> None:
        """Compares the operands of a plan with the package's metadata.

        Raises:
            ValueError: one does not match.
        """
        own = self._metadata.torchcall
        if own is None:  # the package relies on the checks compiled into it
            return
        sizes = _Sizes(own["axes"])
        positions = [int(k) for kind, k in spec.arguments if kind == TENSOR and k is not None]
        for row, k in zip(own["inputs"], positions, strict=True):
            operand = spec.operands[k]
            dtype = jax.numpy.dtype(operand.cast or operand.dtype)
            sizes.check(operand.name, jax.ShapeDtypeStruct(operand.shape, dtype), row)


def _signature(metadata: PackageMetadata) -> object:
    own = metadata.torchcall
    if own is None:
        return None
    return [own[key] for key in ("inputs", "outputs", "axes", "user")]


def _checked(path: Path) -> PackageMetadata:
    """Reads a package's metadata and checks that its code can run here."""
    metadata = read_package(path)

    def refuse(expected: str, got: str) -> ValueError:
        return ValueError(
            f"torchcall: {path}: expected a package compiled for {expected}, got one for {got}; "
            "compile the model here"
        )

    if metadata.device not in ("cpu", "cuda"):
        raise refuse("cpu or cuda", metadata.device)
    if metadata.device == "cuda" and not torch.cuda.is_available():
        raise refuse("a device that torch can use here", "cuda")
    own = metadata.torchcall
    if own is not None and _minor(own["torch"]) != _minor(torch.__version__):
        raise refuse(f"torch {torch.__version__}", f"torch {own['torch']}")
    if own is None and not _is_of_this_torch(path):
        raise refuse(f"torch {torch.__version__}", "another torch, whose code it contains")
    if metadata.machine not in (None, platform.machine()):
        raise refuse(f"a machine {platform.machine()}", f"a machine {metadata.machine}")
    lacking = [name for name in (metadata.isa or "").split() if not _has_instructions(name)]
    if lacking:
        raise refuse("this processor", f"one with {', '.join(lacking)}, which this processor lacks")
    return metadata


def _home(metadata: PackageMetadata) -> int | None:
    """The CUDA device on which `load` loads a package, None for the CPU."""
    return torch.cuda.current_device() if metadata.device == "cuda" else None


def _is_of_this_torch(path: Path) -> bool:
    """Whether a package's source contains this torch's version of a file, or it has no source.

    Packages do not record torch's version, but torch copies that file into the source of each.
    """
    try:
        ours = _normalized(_INTERFACE.read_text())
    except OSError:
        return True
    theirs = [_normalized(text) for text in read_sources(path) if _ENTRY_POINT in text]
    return not theirs or any(ours in text for text in theirs)


def _normalized(text: str) -> str:
    return " ".join(text.split())


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _has_instructions(name: str) -> bool:
    check = getattr(torch.cpu, _ISA_CHECKS.get(name, ""), None)
    return True if check is None else bool(check())
