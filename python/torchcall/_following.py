"""A model as something that fake tensors can follow: tensors made from lists become empty ones."""

from collections.abc import Callable
from typing import Any

import torch

# What reads a list and leaves it as it is.
_READS = {
    "aten::tensor",
    "aten::as_tensor",
    "aten::len",
    "aten::__getitem__",
    "prim::ListConstruct",
}
_DTYPES = {"float": None, "int": torch.int64, "bool": torch.bool, "complex": torch.complex64}


class NotFollowableError(ValueError):
    """The model does something that fake tensors cannot follow."""


def followable(module: Any) -> Callable[..., Any]:
    """Returns a function with the outputs' shapes and dtypes of `module`, to call with fakes.

    Inside TorchScript, `torch.tensor([...])` writes the list straight into the tensor's memory,
    which a fake has none of: the process would end. Such a node is replaced by one that makes a
    tensor of the same shape and dtype.

    Args:
        module: a script module or function. Returned itself where there is nothing to replace.

    Raises:
        NotFollowableError: a tensor is made of a list whose length the code does not tell, or a
            list of a tensor's values, or a part of the model runs on another thread.
    """
    graph = module.inlined_graph
    for kind, what in (("prim::tolist", "tolist()"), ("prim::fork", "torch.jit.fork")):
        if graph.findNode(kind) is not None:
            raise NotFollowableError(f"fake tensors cannot follow {what}")
    from_lists = [
        node
        for kind in ("aten::tensor", "aten::as_tensor")
        for node in graph.findAllNodes(kind)
        if node.inputsAt(0).type().kind() == "ListType"
    ]
    if not from_lists:
        return module
    for node in from_lists:
        _replace(graph, node)
    function = torch._C._create_function_from_graph("forward", graph)
    is_method = isinstance(module, torch.jit.ScriptModule)
    schema = (module.forward if is_method else module).schema  # pyright: ignore
    parameters = [a for a in schema.arguments if not (is_method and a.name == "self")]

    def call(*args: Any, **kwargs: Any) -> Any:
        # A function made of a graph has no default values.
        values = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        for parameter in parameters:
            if parameter.name not in values and parameter.has_default_value():
                values[parameter.name] = parameter.default_value
        ordered = [values[p.name] for p in parameters]
        return function(module, *ordered) if is_method else function(*ordered)

    return call


def _replace(graph: Any, node: Any) -> None:
    shape, element = _shape_of(node.inputsAt(0))
    graph.setInsertPoint(node)
    dtype = node.inputsAt(1)
    if dtype.type().kind() == "NoneType":
        if element not in _DTYPES:
            raise NotFollowableError(f"fake tensors cannot follow a tensor made of a {element}")
        dtype = graph.insertConstant(_DTYPES[element] or torch.get_default_dtype())
    none = graph.insertConstant(None)
    zeros = graph.create("aten::zeros", [graph.insertConstant(shape), dtype, none, none, none], 1)
    graph.insertNode(zeros)
    node.output().replaceAllUsesWith(zeros.output())
    node.destroy()


def _shape_of(value: Any) -> tuple[list[int], str]:
    """Lengths of nested lists, and the type of what is in the innermost."""
    shape = []
    while value.type().kind() == "ListType":
        if value.node().kind() == "prim::Constant":
            items = value.toIValue()
            while isinstance(items, list):
                shape.append(len(items))
                items = items[0] if items else None
            return shape, str(value.type()).replace("List[", "").rstrip("]")
        if value.node().kind() != "prim::ListConstruct" or not _stays_as_made(value):
            raise NotFollowableError("fake tensors cannot follow a tensor made of a variable list")
        items = list(value.node().inputs())
        shape.append(len(items))
        if not items:
            return shape, str(value.type().getElementType())
        value = items[0]
    return shape, str(value.type())


def _stays_as_made(value: Any) -> bool:
    return all(use.user.kind() in _READS for use in value.uses())
