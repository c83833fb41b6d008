"""Names that JAX and torch do not promise: each is there, and used in `_undocumented` only.

torchcall works without the optional ones. Only the versions that it is developed with must have
them; with others the test of a missing one is skipped and names it.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from jax._src import api, pjit
from jax._src.sharding_impls import GSPMDSharding
from torch.fx.experimental.proxy_tensor import make_fx

import torchcall
from torchcall._undocumented import of_compiler, of_jax

PACKAGE = Path(torchcall.__file__).parent
HOMES = sorted((PACKAGE / "_undocumented").glob("*.py"))
NODES = {path: list(ast.walk(ast.parse(path.read_text()))) for path in PACKAGE.rglob("*.py")}
FILES = [path for path in sorted(NODES) if path not in HOMES]
# Without an underscore, and not in the documentation either.
UNDOCUMENTED = ("jax.core.ShapedArray", "jax.extend", "jax.interpreters", "torch.jit.optimized_ex")
# With an underscore, and documented: of named tuples and torch.jit.load.
DOCUMENTED = {"_asdict", "_extra_files", "_fields", "_replace"}
# Of Python and of networks.
OTHERS = {
    "_operator",
    "_GLOBAL_STATE_INITIALIZED",
    "_JIT_FUSION_STRATEGY",
    "_const",
    "_prefix",
    "_type_map",
}
# What torchcall does without each.
OPTIONAL = {
    of_compiler.BUILDER: "it compiles the files of a package one after the other",
    of_compiler.FAKE_TENSOR_CACHE: "it compiles more slowly",
    of_compiler.STRIDE: "it compiles more slowly",
    of_compiler.VALID_INSTRUCTIONS: "torch compiles tests of the processor",
    "_apply_primitive": "jax_debug_nans runs a call again",
    "_is_amx_tile_supported": "packages for it are not refused",
    "_is_avx2_supported": "packages for it are not refused",
    "_is_avx512_supported": "packages for it are not refused",
    "_is_vnni_supported": "packages for it are not refused",
    "_torchdynamo_inline": "script functions have no source",
}
PINS = (Path(__file__).parents[1] / "requirements" / "constraints.txt").read_text().splitlines()
DEVELOPED_WITH = {f"torch=={torch.__version__.split('+')[0]}", f"jax=={jax.__version__}"} <= {*PINS}


def refuse_missing(name: str) -> None:
    """Fails, or skips the test of an optional name."""
    if name in OPTIONAL and not DEVELOPED_WITH:
        pytest.skip(f"without {name}: {OPTIONAL[name]}")
    pytest.fail(f"the installed jax and torch lack {name}")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_undocumented(dotted: str) -> bool:
    root, *rest = dotted.split(".")
    return root in ("jax", "jaxlib", "torch") and (
        any(map(is_private, rest)) or dotted.startswith(UNDOCUMENTED)
    )


def dotted_name(node: ast.AST, imported: dict[str, str]) -> str | None:
    """The full name of an attribute of an imported module."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value, imported)):
        return f"{base}.{node.attr}"
    return None


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and names: in full from imports and attributes of modules, `._name` from others."""
    nodes = NODES[path]
    imported: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    inner = {n.value for n in nodes if isinstance(n, ast.Attribute)}
    inner |= {part for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            dotted = dotted_name(node, imported)
            if dotted and node not in inner:
                yield node.lineno, dotted
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not dotted and not own and is_private(node.attr):
                yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            yield node.value.lineno, f".{node.arg}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            if re.fullmatch(r"_[A-Za-z]\w*(/[\w./]+)?", node.value):
                yield node.lineno, f".{node.value}"
            elif re.fullmatch(r"(jax|torch)(\.\w+)+", node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.ClassDef) and node.bases:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and is_private(part.name):
                    yield part.lineno, f"def {part.name}"


def own_names() -> set[str]:
    """Private names that the package itself gives to something."""
    found = {path.stem for path in PACKAGE.rglob("_*")}
    for path in FILES:
        for node in NODES[path]:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


USED = {name for path in HOMES for _, name in names_in(path)}
NAMES = sorted(name for name in USED if is_undocumented(name))
ATTRIBUTES = sorted(name.removeprefix(".") for name in USED if name.startswith("."))


def test_undocumented_names_are_used_in_one_place_only():
    own = own_names() - set(ATTRIBUTES)
    found = []
    for path in FILES:
        for line, name in names_in(path):
            if name.startswith("def "):  # overrides a method
                wrong = name.removeprefix("def ") in ATTRIBUTES
            elif name.startswith("."):
                wrong = name.removeprefix(".") not in own | DOCUMENTED | OTHERS
            else:
                wrong = is_undocumented(name)
            if wrong:
                found.append(f"{path.relative_to(PACKAGE)}:{line}: {name}")
    assert not found, "\n".join(found)


def test_optional_names_are_used():
    assert {*OPTIONAL} <= {*NAMES, *ATTRIBUTES}


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_jax_and_torch_have(name):
    if name.startswith("torch._C._cuda") and torch.version.cuda is None:
        declared = Path(torch.__file__).parent / "_C" / "__init__.pyi"
        assert f"def {name.rpartition('.')[2]}(" in declared.read_text()
        return
    found: Any = importlib.import_module(name.split(".")[0])
    for end, part in enumerate(name.split(".")[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(name.split(".")[:end]))
            except ImportError:
                refuse_missing(name)


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def lowering_context() -> Any:
    seen = []

    def rule(context: Any, x: Any) -> list[Any]:
        seen.append(context)
        return [x]

    primitive = of_jax.Primitive("probe")
    primitive.def_abstract_eval(lambda x: x)
    of_jax.register_lowering(primitive, rule)
    jax.jit(primitive.bind).lower(1.0)
    return seen[0].module_context


# What has each attribute.
OWNERS = {
    "_allow_non_fake_inputs": lambda: inspect.signature(make_fx).parameters,
    "_apply": torch.nn.Module,
    "_apply_primitive": lambda: inspect.getsource(api) + inspect.getsource(pjit),
    "_buffers": torch.nn.Module,
    "_c": lambda: torch.jit.script(Module()),
    "_cdata": lambda: torch.zeros(1).untyped_storage(),
    "_concrete_type": lambda: torch.jit.script(Module()),
    "_forward_hooks": torch.nn.Module,
    "_forward_pre_hooks": torch.nn.Module,
    "_hlo_sharding": lambda: GSPMDSharding.get_replicated(jax.devices()),
    "_is_amx_tile_supported": lambda: torch.cpu,
    "_is_avx2_supported": lambda: torch.cpu,
    "_is_avx512_supported": lambda: torch.cpu,
    "_is_view": lambda: torch.zeros(1),
    "_is_vnni_supported": lambda: torch.cpu,
    "_modules": torch.nn.Module,
    "_orig_mod": lambda: torch.compile(Module()),
    "_parameters": torch.nn.Module,
    "_schema": lambda: torch.ops.aten.add.Tensor,
    "_torchdynamo_inline": lambda: torch.jit.script(double),
    "_version": lambda: torch.zeros(1),
    "add_keepalive": lowering_context,
    "lowering_parameters.for_export": lowering_context,
    "platforms": lowering_context,
}
FILE = "_inductor/codegen/aoti_runtime/interface.cpp"


@pytest.mark.parametrize("attribute", [a for a in sorted({*ATTRIBUTES, *OWNERS}) if a != FILE])
def test_objects_of_the_installed_jax_and_torch_have(attribute):
    assert attribute in OWNERS, "add its owner to this test"
    owner: Any = OWNERS[attribute]()
    for part in attribute.split("."):
        if not (hasattr(owner, part) or (isinstance(owner, str | Mapping) and part in owner)):
            refuse_missing(attribute)
        owner = getattr(owner, part, None)


def test_the_installed_torch_copies_a_file_into_packages():
    assert FILE in ATTRIBUTES
    assert (Path(torch.__file__).parent / FILE).is_file()
