"""Exported programs that were damaged, sharded, or whose weights are replaced during calls."""

import json
import re
import threading
import time

import jax
import numpy as np
import pytest
import torch
from jax import export
from models import Scale, assert_same

import torchcall
from torchcall._call.exported import ExportedCall, load_exported

X = np.linspace(-1, 1, 3, dtype=np.float32)


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.pt"
    torch.jit.script(Scale(2.0)).save(path)
    return path


def exported(f, *args):
    return export.export(jax.jit(f), disabled_checks=torchcall.export_checks())(*args)


def text_of(program):
    """The text of the only call in an exported program."""
    text = re.search(r'program = "((?:[^"\\]|\\.)*)"', program.mlir_module())
    assert text is not None
    return text[1].replace("\\22", '"').replace("\\5C", "\\")


DAMAGES = {
    "cut": lambda text: text[:-9],
    "no text": lambda _: "",
    "a list": lambda _: "[]",
    "no name": lambda text: text.replace('"name"', '"title"', 1),
    "an unknown field": lambda text: text.replace('"loops"', '"cycles"'),
    "another type": lambda text: text.replace('"lengths":[]', '"lengths":7'),
    "a later format": lambda text: text.replace('"format":1', '"format":2'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_program_of_another_version_or_damaged_is_refused(two, damage):
    f = torchcall.load(two)
    text = text_of(exported(f, X))
    assert json.loads(text)["name"] == "Scale (two.pt)"

    def result(text):
        call = load_exported(text, "cpu")
        return call.register(None) if isinstance(call, ExportedCall) else call

    assert not isinstance(result(text), str)
    refusal = result(damage(text))
    assert isinstance(refusal, str)
    assert re.match("torchcall: .*cannot run an exported program: .*export it again", refusal)


def test_a_call_with_a_sharding_rule_is_exported_whole(two):
    f = torchcall.load(two, sharding_rule="i -> i")
    assert_same(exported(f, X).call(X), 2 * X)
    assert_same(exported(jax.grad(lambda x: (f(x) ** 2).sum()), X).call(X), 8 * X)


@pytest.mark.slow  # rare without the check after a call
def test_weights_that_are_replaced_during_calls_are_never_used(two):
    f = torchcall.load(two)
    run = jax.jit(exported(f, X).call).lower(X).compile()
    files = [torch.jit.script(Scale(factor)) for factor in (5.0, 2.0)]
    got, ends = set(), threading.Event()

    def calls():
        while not ends.is_set():
            try:
                got.add(float(run(X)[0] / X[0]))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                got.add("refresh() replaced them" in str(error))

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for file in files:
            file.save(two)
            f.refresh()
    ends.set()
    for thread in threads:
        thread.join()
    assert got <= {2.0, True}
