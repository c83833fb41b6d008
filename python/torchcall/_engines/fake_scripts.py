"""TorchScript under fake tensors: replaces operations that would crash the process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchcall._undocumented.of_torch import ScriptMethod, function_of_graph, python_function

# Operators that read a list and do not change it.
_READS = {
    "aten::tensor",
    "aten::as_tensor",
    "aten::len",
    "aten::__getitem__",
    "prim::ListConstruct",
}
_DTYPES = {"float": None, "int": torch.int64, "bool": torch.bool, "complex": torch.complex64}


class NotTraceableError(ValueError):
    """The model cannot be traced with fake tensors."""


def traceable(module: Any) -> Callable[..., Any]:
    """A function of fake tensors, whose outputs have the shapes and dtypes of `module`'s.

    Inside TorchScript, `torch.tensor([...])` writes the list into the tensor's memory. Fake tensors
    have no memory, so this would crash the process. Such nodes are replaced by `torch.zeros` of the
    same shape and dtype.

    Args:
        module: a script function or method. It is returned itself if there is nothing to replace.

    Raises:
        NotTraceableError: a tensor is made from a list of unknown length, `tolist()` reads a
            tensor's values, or `torch.jit.fork` runs a part of the model on another thread.
    """
    graph = module.inlined_graph
    for kind, what in (("prim::tolist", "tolist()"), ("prim::fork", "torch.jit.fork")):
        if graph.findNode(kind) is not None:
            raise NotTraceableError(f"fake tensors cannot trace {what}")
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
    function = function_of_graph("forward", graph)
    is_method = not isinstance(module, torch.jit.ScriptFunction)
    arguments = module.schema.arguments
    parameters = [a for a in arguments if not (is_method and a.name == "self")]

    def call(*args: Any, **kwargs: Any) -> Any:
        # A function made from a graph has no default values.
        values = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        for parameter in parameters:
            if parameter.name not in values and parameter.has_default_value():
                values[parameter.name] = parameter.default_value
        ordered = [values[p.name] for p in parameters]
        return function(module.raw_owner, *ordered) if is_method else function(*ordered)

    return call


_lock = threading.Lock()
_here = threading.local()  # `contexts`: the option of each context of this thread
_active = 0
_KINDS: tuple[Any, ...] = (torch.jit.ScriptFunction, ScriptMethod)
_originals = {kind: kind.__call__ for kind in _KINDS}


@contextmanager
def traceable_scripts(*, inline_functions: bool = False) -> Iterator[None]:
    """In this context and thread, script functions and methods can be called with fake tensors.

    This includes those that an eager model calls. torch has no hook for it, so the classes' own
    `__call__` is replaced while any thread is in such a context.

    Args:
        inline_functions: whether script functions run as the Python functions that they came from.
            TorchScript converts symbolic sizes to constants; e3nn's spherical harmonics would fix
            the number of edges.

    Raises:
        NotTraceableError: in the context, one that is called cannot be traced.
    """
    global _active
    with _lock:
        _active += 1
        for kind in _KINDS if _active == 1 else ():
            kind.__call__ = _traceable_call(_originals[kind])
    contexts = _here.__dict__.setdefault("contexts", [])
    contexts.append(inline_functions)
    try:
        yield
    finally:
        contexts.pop()
        with _lock:
            _active -= 1
            for kind in _KINDS if _active == 0 else ():
                kind.__call__ = _originals[kind]


def _traceable_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        contexts = getattr(_here, "contexts", None)
        if not contexts:  # another thread's context
            return original(self, *args, **kwargs)
        python = python_function(self)
        if contexts[-1] and python is not None:
            return python(*args, **kwargs)
        function = traceable(self)
        return original(self, *args, **kwargs) if function is self else function(*args, **kwargs)

    return call


def _replace(graph: Any, node: Any) -> None:
    shape, element = _shape_of(node.inputsAt(0))
    graph.setInsertPoint(node)
    dtype = node.inputsAt(1)
    if dtype.type().kind() == "NoneType":
        if element not in _DTYPES:
            raise NotTraceableError(f"fake tensors cannot trace a tensor made from a {element}")
        dtype = graph.insertConstant(_DTYPES[element] or torch.get_default_dtype())
    none = graph.insertConstant(None)
    zeros = graph.create("aten::zeros", [graph.insertConstant(shape), dtype, none, none, none], 1)
    graph.insertNode(zeros)
    node.output().replaceAllUsesWith(zeros.output())
    node.destroy()


def _shape_of(value: Any) -> tuple[list[int], str]:
    """The lengths of nested lists, outermost first, and the type of the innermost elements."""
    shape = []
    while value.type().kind() == "ListType":
        if value.node().kind() == "prim::Constant":
            items = value.toIValue()
            while isinstance(items, list):
                shape.append(len(items))
                items = items[0] if items else None
            return shape, str(value.type()).replace("List[", "").rstrip("]")
        if value.node().kind() != "prim::ListConstruct" or not _is_only_read(value):
            raise NotTraceableError(
                "fake tensors cannot trace a tensor made from a list of variable length"
            )
        items = list(value.node().inputs())
        shape.append(len(items))
        if not items:
            return shape, str(value.type().getElementType())
        value = items[0]
    return shape, str(value.type())


def _is_only_read(value: Any) -> bool:
    return all(use.user.kind() in _READS for use in value.uses())
