"""Removes operators from a traced graph: constant, repeated and without effect.

torch's exporter and compiler trace the graph again several times, a third of the time of a MACE
compilation. Operators on weights alone would otherwise also run in every call.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchcall._undocumented.of_torch import BUFFERS, PARAMETERS, OpOverload, schema, unsafe_view

_aten = torch.ops.aten
# They return their input if they do not change its shape.
_SAME_IF_SHAPE = {
    _aten.view.default,
    unsafe_view,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.detach.default,
    _aten.alias.default,
}


def simplify(module: GraphModule) -> None:
    """Changes the graph in place. Its results stay the same, up to rounding.

    Nothing is removed that the graph writes to, or that shares memory with such a tensor. A graph
    with operators of an unknown kind is not changed.
    """
    nodes = list(module.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    if not all(_known(node.target) for node in calls):
        return
    base = _bases(nodes)
    written = {base[arg] for node in calls for arg in _written_by(node)}
    constants: dict[Node, torch.Tensor] = {}
    first: dict[Any, Node] = {}
    for node in nodes:
        if node.op == "get_attr":
            value = getattr(module, str(node.target), None)
            _reuse(node, first, ("get_attr", node.target))
            if isinstance(value, torch.Tensor) and base[node] not in written:
                constants[node] = value
            continue
        inputs = node.all_input_nodes
        if node.op != "call_function" or any(base[n] in written for n in (node, *inputs)):
            continue
        if not _pure(node.target):
            continue
        if _returns_its_input(node):
            node.replace_all_uses_with(inputs[0])
            continue
        if inputs and all(n in constants for n in inputs):
            constant = _fold(module, node, constants)
            if constant is not None:
                base[constant] = constant
                continue
        if (key := _key(node)) is not None:
            _reuse(node, first, key)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for group in (getattr(module, BUFFERS), getattr(module, PARAMETERS), vars(module)):
        for name in [k for k, v in group.items() if isinstance(v, torch.Tensor) and k not in used]:
            del group[name]
    module.recompile()


def written_inputs(module: GraphModule) -> list[int]:
    """The inputs, by position, to whose memory the graph writes."""
    nodes = list(module.graph.nodes)
    base = _bases(nodes)
    written = {base[arg] for node in nodes for arg in _written_by(node)}
    inputs = [node for node in nodes if node.op == "placeholder"]
    return [k for k, node in enumerate(inputs) if node in written]


def _known(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return torch.Tag.inplace_view not in target.tags
    return getattr(target, "__module__", "") in ("_operator", "math", "torch")


def _pure(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace == "aten" and not schema(target).is_mutable and not random


def _written_by(node: Node) -> list[Node]:
    """The tensors that an operator writes to."""
    target: Any = node.target
    if not isinstance(target, OpOverload) or not schema(target).is_mutable:
        return []
    found: list[Node] = []
    for i, argument in enumerate(schema(target).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            map_arg((value,), found.append)  # type: ignore[arg-type]
    return found


def _bases(nodes: list[Node]) -> dict[Node, Node]:
    """For each node the tensor whose memory it may share; itself if it owns its memory."""
    base: dict[Node, Node] = {}
    constants: dict[Any, Node] = {}
    for node in nodes:
        base[node] = node
        if node.op == "get_attr":
            base[node] = constants.setdefault(node.target, node)
        elif node.op == "call_function" and node.all_input_nodes and _shares(node.target):
            base[node] = base[node.all_input_nodes[0]]
    return base


def _shares(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    # These may return their input, without saying so in their schema.
    if target in (unsafe_view, _aten.reshape.default, _aten.contiguous.default):
        return True
    return any(result.alias_info is not None for result in schema(target).returns)


def _shape(node: Node) -> list[Any] | None:
    """Sizes as numbers and expressions, which compare without a guard on the sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]


def _returns_its_input(node: Node) -> bool:
    if node.target is _aten.permute.default:
        dims: Any = node.args[1]
        return list(dims) == list(range(len(dims)))
    if node.target not in _SAME_IF_SHAPE:
        return False
    shape = _shape(node)
    return shape is not None and shape == _shape(node.all_input_nodes[0])


def _fold(module: GraphModule, node: Node, constants: dict[Node, torch.Tensor]) -> Node | None:
    """The result of an operator on constants, as a constant; None if it is larger than they are.

    Views are only evaluated: they cost nothing in a call, and a copy would take memory.
    """
    target: Any = node.target
    if not isinstance(target, OpOverload):
        return None
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: constants[n])
    with torch.no_grad():
        result = target(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        return None
    if _shares(target):
        constants[node] = result
        return None
    memory = max(constants[n].untyped_storage().nbytes() for n in node.all_input_nodes)
    if result.untyped_storage().nbytes() > memory:
        return None
    name = f"_folded_{len(constants)}"
    module.register_buffer(name, result)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    constants[constant] = result
    return constant


def _key(node: Node) -> Any:
    """What determines an operator's result; None if that cannot be compared."""
    key = (node.target, _frozen(node.args), _frozen(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(entry)) for key, entry in sorted(value.items()))
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return value if isinstance(value, Node) else (type(value), repr(value), value)


def _reuse(node: Node, first: dict[Any, Node], key: Any) -> None:
    earlier = first.setdefault(key, node)
    if earlier is not node:
        node.replace_all_uses_with(earlier)
