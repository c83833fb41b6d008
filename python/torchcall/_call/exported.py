"""Calls in programs that `jax.export` writes: they describe themselves and name their model.

A program of this process names a registered plan. An exported one runs where there is no such plan:
the attribute of its call is the text of everything that a plan needs, and the model's digest. The
process that runs it makes the plan from the text and from a wrapper of a model with this digest.
"""

import itertools
import json
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jax import export

from torchcall import _bridge, _native, _targets
from torchcall._call.content import content_of
from torchcall._call.plan import CallPlan, Operand, PlanSpec, no_content
from torchcall._call.specs import is_symbolic
from torchcall._versions import minor

# Raised whenever the text changes its meaning.
_FORMAT = 1
# Not an id of `CallPlan.register`, which are never negative.
_PLAN_ID = -1


def export_checks() -> list[export.DisabledSafetyCheck]:
    """The checks that `jax.export.export` must leave out for programs with torch calls.

    JAX refuses to export custom calls of other libraries unless the caller says that they will be
    there, unchanged, where the program runs:

        exported = jax.export.export(
            jax.jit(f), disabled_checks=torchcall.export_checks()
        )(x)
        blob = exported.serialize()

    In the process that runs the program, wrap the same file before the first call, and keep the
    wrapper until then: `model = torchcall.load(path)`, then
    `jax.export.deserialize(blob).call(x)`.
    """
    targets = _targets.EXPORTED, _targets.NEIGHBORS
    return [export.DisabledSafetyCheck.custom_call(target) for target in targets]


class Model:
    """A model that exported programs of this process may call, as long as this object lives.

    Args:
        native: the model.
        name: what errors call it.
        check: raises a ValueError if the model does not take operands of these sizes.
    """

    def __init__(self, native: _bridge.Model, name: str, check: Callable[[PlanSpec], None]) -> None:
        self.native = native
        self.name = name
        self.check = check
        with _models_lock:
            _models.add(self)


_models: weakref.WeakSet[Model] = weakref.WeakSet()
_models_lock = threading.Lock()  # a set cannot be listed while another thread adds to it


def program_of(plan: CallPlan) -> str:
    """The text of a call, of plain ASCII.

    Raises:
        TypeError, ValueError: the model has no fixed content.
    """
    content = plan.content()
    if not content:
        raise no_content(plan, "export a program")
    spec = plan.spec
    spec = spec._replace(
        # Not needed to run the call.
        eager_runner=None,
        derivative=None,
        no_derivatives="",
        gradient_of=(),
        operands=[_plain(operand) for operand in spec.operands],
        outputs=[_plain(output) for output in spec.outputs],
        loops=[(_size(size), mapped) for size, mapped in spec.loops],
    )
    text = {
        "format": _FORMAT,
        "torch": minor(torch.__version__),
        "name": plan.model_name,
        "content": content,
        "fingerprint": plan.model.fingerprint,
        "options": plan.model.options,
        "has_sizes": not plan.is_symbolic,
        "spec": spec._asdict(),
    }
    return json.dumps(text, separators=(",", ":"))


class ExportedCall:
    """A call of an exported program, and the model of this process that it calls.

    Attributes:
        content: the model's digest.
        has_sizes: whether the description has all sizes, so that `register` needs no shapes.
    """

    def __init__(self, program: dict[str, Any], model: Model) -> None:
        self.content = str(program["content"])
        self.has_sizes = bool(program["has_sizes"])
        self._name: str = program["name"]
        self._model = model
        spec = dict(program["spec"])
        spec["operands"] = [Operand(*row) for row in spec["operands"]]
        spec["outputs"] = [Operand(*row) for row in spec["outputs"]]
        self._spec = PlanSpec(**spec)

    def register(self, shapes: list[list[int]] | None) -> "_bridge.NativeRegistration | str":
        """Makes the plan of the call, registered for as long as the result lives.

        Args:
            shapes: of XLA's operands and results; None: those of the description.

        Returns:
            The registration, or the text of an error.
        """
        try:
            spec = self._spec if shapes is None else _sized(self._spec, shapes)
            if shapes is not None:
                self._model.check(spec)
            plan = _bridge.NativePlan(self._model.native, self._name, spec)
            if isinstance(spec.threads, int):
                plan.set_threads(spec.threads)
            return _bridge.NativeRegistration(plan, _PLAN_ID)
        except ValueError as error:
            text = str(error)
            return text if text.startswith("torchcall:") else f"torchcall: {self._name}: {text}"
        except Exception as error:
            return _unreadable(error)


def load_exported(text: str, platform: str) -> ExportedCall | str:
    """Finds the model of a call. XLA asks for it when it loads an executable.

    Returns:
        The call, or the text of an error.
    """
    try:
        return _load(json.loads(text), platform)
    except Exception as error:
        return _unreadable(error)


def _unreadable(error: Exception) -> str:
    """The error of a text that another version wrote, or that was changed."""
    return (
        "torchcall: cannot run an exported program: expected one that this version of torchcall "
        f"exported, got one that it cannot read ({type(error).__name__}: {error}); export it again"
    )


def _load(program: dict[str, Any], platform: str) -> ExportedCall | str:
    name = program["name"]

    def refuse(expected: str, got: str, instead: str) -> str:
        return (
            f"torchcall: {name}: cannot run an exported program: expected {expected}, got {got}; "
            f"{instead}"
        )

    if program["format"] != _FORMAT:
        return refuse(
            f"a program of format {_FORMAT}",
            f"format {program['format']} of another torchcall",
            "export it again with this one",
        )
    if program["torch"] != minor(torch.__version__):
        return refuse(
            f"torch {program['torch']}, with which it was exported",
            f"torch {torch.__version__}",
            "export it again with this one",
        )
    obstacle = _native.prepare_cuda() if platform == "cuda" else None
    if obstacle is not None:
        return refuse("a torch with CUDA", obstacle, "install one")
    with _models_lock:
        models = list(_models)
    found = _find(program, models)
    if isinstance(found, Model):
        return ExportedCall(program, found)
    return refuse(*found)


def _find(program: dict[str, Any], models: list[Model]) -> Model | tuple[str, str, str]:
    """The model of a program; or what was expected, what there is instead, and what to do."""
    expected = f"its model (digest {program['content'][:12]})"
    wrap = "wrap the file that it was exported with, and keep the wrapper"
    same_code = [m for m in models if m.native.fingerprint == program["fingerprint"]]
    contents = {model: content_of(model.native) for model in same_code}
    wanted = program["content"]
    same = [model for model, content in contents.items() if content and content == wanted]
    options = tuple(program["options"])
    for model in same:
        if model.native.options == options:
            return model
    if same:
        wanted, got = (
            f"freeze={freeze}, requires_grad={requires_grad}"
            for freeze, requires_grad in (options, same[0].native.options)
        )
        return f"a wrapper with {wanted}", f"one with {got}", "pass these options"
    if not models:
        return expected, "no model in this process", wrap
    for model, content in contents.items():
        if not content and model.native.file is not None:
            return expected, f"{model.name}, whose file changed after it was loaded", wrap
    if contents:
        what = "with other weights or code" if any(contents.values()) else "with live weights"
        return expected, f"{', '.join(sorted(m.name for m in contents))} {what}", wrap
    return expected, f"other models: {', '.join(sorted(m.name for m in models))}", wrap


def _plain(array: Operand) -> Operand:
    return array._replace(shape=[_size(size) for size in array.shape])  # pyright: ignore[reportArgumentType]


def _size(size: Any) -> int | None:
    return None if is_symbolic(size) else int(size)


def _sized(spec: PlanSpec, shapes: list[list[int]]) -> PlanSpec:
    """The specification for buffers of these shapes, which begin with the mapped axes."""
    operands, outputs = shapes[: len(spec.operands)], shapes[len(spec.operands) :]
    n_mapped = [sum(mapped[i] for _, mapped in spec.loops) for i in range(len(operands))]
    sizes = itertools.repeat(0) if not outputs else outputs[0]

    def shaped(
        arrays: Iterable[Operand], shapes: list[list[int]], skip: list[int]
    ) -> list[Operand]:
        return [
            array._replace(shape=shape[n:])
            for array, shape, n in zip(arrays, shapes, skip, strict=True)
        ]

    return spec._replace(
        operands=shaped(spec.operands, operands, n_mapped),
        outputs=shaped(spec.outputs, outputs, [len(spec.loops)] * len(outputs)),
        loops=[(size, mapped) for size, (_, mapped) in zip(sizes, spec.loops, strict=False)],
    )


_bridge.set_exported_loader(load_exported)
_targets.register_exported()
