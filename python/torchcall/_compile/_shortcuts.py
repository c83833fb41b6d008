"""Work of torch's compiler that a package does not need, or that can be done at the same time.

Each shortcut replaces something inside torch's compiler while a package is made, and restores it.
Where a version of torch has other names, torch's own way is used.
"""

import contextlib
import gc
import platform
import threading
from collections.abc import Iterator
from typing import Any

from torchcall._undocumented.of_compiler import (
    BUILDER,
    FAKE_TENSOR_CACHE,
    VALID_INSTRUCTIONS,
    found,
    has_own_instructions,
    patched,
    replaced,
    supported_vec_isa_list,
    x86_isa_checker,
)
from torchcall._undocumented.of_torch import enable_amx


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Everything in this module, for tracing and compiling."""
    with known_instructions(), uncached_fake_tensors(), no_collections(), parallel_files():
        yield


@contextlib.contextmanager
def known_instructions() -> Iterator[None]:
    """torch's compiler believes what the processor reports of its vector instructions.

    It otherwise compiles and loads one to six tests. Every x86 compiler of C++20 has the
    instructions that torch asks for. The user's setting `vec_isa_ok` has precedence.
    """
    lacks = found(VALID_INSTRUCTIONS) is None
    if lacks or has_own_instructions() or platform.machine() != "x86_64":
        yield
        return
    with replaced(VALID_INSTRUCTIONS, _reported):
        yield


def _reported() -> list[Any]:
    """torch's sets of instructions that the processor has, the best first."""
    flags = x86_isa_checker()
    usable = []
    for isa in supported_vec_isa_list:
        if all(flag in flags for flag in str(isa).split()):
            # Linux enables AMX for each process.
            if "amx_tile" in str(isa) and not enable_amx():
                continue
            usable.append(_untested(type(isa)))
    return usable


def _untested(kind: type[Any]) -> Any:
    """A set of instructions whose truth value is not found by compiling a test."""
    body = {"__bool__": lambda _: True, "__hash__": kind.__hash__}
    return type(kind.__name__, (kind,), body)()


@contextlib.contextmanager
def uncached_fake_tensors() -> Iterator[None]:
    """Fake tensors compute each operator's shape without a cache.

    With symbolic sizes, making a tensor from the cache takes longer than that.
    """
    if found(FAKE_TENSOR_CACHE) is None:
        yield
        return
    with patched(FAKE_TENSOR_CACHE, False):
        yield


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No search for unreachable cycles, which would visit the compiler's millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def parallel_files() -> Iterator[None]:
    """The C++ compiler works on a package's two files at the same time."""
    own = found(BUILDER)
    if not (hasattr(own, "build") and hasattr(own, "get_target_file_path")):
        yield
        return
    running: list[tuple[threading.Thread, list[BaseException]]] = []

    def wait() -> None:
        while running:
            thread, errors = running.pop()
            thread.join()
            if errors:
                raise errors[0]

    class Builder(own):
        def build(self) -> None:
            if self.get_target_file_path().endswith(".wrapper.o"):
                errors: list[BaseException] = []
                thread = threading.Thread(target=self._build_beside, args=(errors,))
                running.append((thread, errors))
                thread.start()
                return
            try:
                super().build()
            finally:
                wait()

        def _build_beside(self, errors: list[BaseException]) -> None:
            try:
                super().build()
            except BaseException as error:  # raised again by the thread that waits
                errors.append(error)

    try:
        with replaced(BUILDER, Builder):
            yield
    finally:
        wait()
