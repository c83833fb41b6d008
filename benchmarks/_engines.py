"""What `md_loop.py` measures of the engines: one potential through each, a call and a step."""

from pathlib import Path
from typing import Any

import torch
from _dynamics import Constants, State
from _harness import (
    BUFFER,
    FLOOR,
    PURE,
    Problem,
    Report,
    Run,
    graph_of,
    jitted_loop,
    liquid,
    peers,
    tensors_of,
)
from _native_loop import package_loop, script_loop
from _shares import STEP, exact_graph, nested, with_gradients

from torchcall import mliap
from torchcall._command.included import load_example
from torchcall.demo._peers import CallCounter
from torchcall.mliap import AtomGraphInput, TorchMliap, pad_graph
from torchcall.mliap._input import input_dtypes, output_specs

SCRIPT, EAGER, ANY, FIXED = (
    "torchcall, TorchScript",
    "torchcall, eager",
    "torchcall, AOTInductor",
    "torchcall, AOTInductor, fixed shapes",
)
ENGINES = {SCRIPT: "TorchScript", EAGER: "eager", ANY: "AOTInductor", FIXED: "AOTInductor"}


def models(
    name: str,
    module: torch.nn.Module,
    cutoff: float,
    graph: AtomGraphInput,
    folder: Path,
    *,
    fixed: bool = True,
) -> dict[str, TorchMliap]:
    """The module through each engine, for any shapes and, if wanted, for the graph's own."""
    options: dict[str, Any] = {"requires_grad": differentiates(module)}
    result = {
        SCRIPT: TorchMliap.from_module(torch.jit.script(module), cutoff, **options),
        EAGER: TorchMliap.from_module(module, cutoff, **options),
    }
    for method, dynamic in ((ANY, True), (FIXED, False))[: 1 + fixed]:
        path = package_path(folder, name, method)
        mliap.compile(module, path, example=graph, cutoff=cutoff, dynamic=dynamic)
        result[method] = TorchMliap.from_package(path)
    return result


def differentiates(module: torch.nn.Module) -> bool:
    """Whether the module computes its gradients by autograd."""
    return not hasattr(module, "autograd") or bool(module.autograd)


def package_path(folder: Path, name: str, method: str) -> Path:
    """The file of a potential's package for any shapes (`ANY`) or for the graph's own (`FIXED`)."""
    return folder / f"{name}-{'fixed' if method == FIXED else 'any'}.pt2"


def potentials() -> dict[str, tuple[torch.nn.Module, float]]:
    """Modules that differentiate inside, as learnt potentials do, and one that has formulas."""
    lennard_jones = load_example("lennard_jones").LennardJones
    network = load_example("message_passing").MessagePassing(cutoff=4.0)
    return {
        "Lennard-Jones by autograd": (lennard_jones(cutoff=8.5, autograd=True).eval(), 8.5),
        "Lennard-Jones by formulas": (lennard_jones(cutoff=8.5).eval(), 8.5),
        "message passing": (network.eval(), 4.0),
    }


def calls(report: Report, folder: Path, n_atoms: int = 64) -> None:
    """The model's call alone, in a jitted loop, and the same module by callbacks."""
    for name, (module, cutoff) in potentials().items():
        positions, cell = liquid(n_atoms)
        graph, _ = pad_graph(graph_of(positions, cell, cutoff, slack=1.0), cutoff=cutoff)
        runs: dict[str, Run] = {}
        engines = dict(ENGINES)
        for method, model in models(name, module, cutoff, graph, folder).items():
            runs[method] = call_loop(model, graph)
            if method != EAGER:
                floor = f"{FLOOR}, {method.removeprefix('torchcall, ')}"
                runs[floor] = floor_loop(method, module, graph, package_path(folder, name, method))
                engines[floor] = ENGINES[method]
        for peer, run in eager_peers(name, module, graph).items():
            runs[peer], engines[peer] = run, "eager"
        case = f"engines, {name}, {n_atoms} atoms, {graph['edge_index'].shape[1]} edges"
        timings = report.time(case, runs, engines=engines)
        us = {method: timing.us_median for method, timing in timings.items()}
        report.claim(case, "eager / buffer_callback", us[EAGER] / us[BUFFER], 1)
        if name == "message passing":
            continue
        best = ANY if name == "Lennard-Jones by autograd" else FIXED
        for method, least in ((SCRIPT, 2.5), (PURE, 8)):
            report.claim(case, f"{method} / {best}", us[method] / us[best], least, at_most=False)


def call_loop(model: TorchMliap, graph: AtomGraphInput) -> Run:
    """The model's call in one jitted loop."""
    return jitted_loop(model.call, (graph,), lambda: model.wrapper.stats()["calls"])


def floor_loop(method: str, module: torch.nn.Module, graph: AtomGraphInput, package: Path) -> Run:
    """The model alone in a C++ loop: as TorchScript, or its package."""
    tensors = (tensors_of(graph),)
    if method != SCRIPT:
        return package_loop(package, tensors)
    return script_loop(torch.jit.script(module), tensors, requires_grad=differentiates(module))


def eager_peers(name: str, module: torch.nn.Module, graph: AtomGraphInput) -> dict[str, Run]:
    """The eager module by JAX's callbacks."""
    problem = Problem(
        name,
        module,
        (graph,),
        output_specs,
        (input_dtypes(),),
        requires_grad=differentiates(module),
    )
    runs: dict[str, Run] = {}
    for peer, make in peers(["wrap_torch2jax"]).items():
        counter = CallCounter()
        call = make(module, counter=counter, **problem.options())
        runs[peer] = jitted_loop(call, problem.args, lambda counter=counter: counter.calls)
    return runs


def steps(
    report: Report, folder: Path, state: State, constants: Constants, cutoff: float, dt: float
) -> None:
    """A whole step of molecular dynamics through each engine."""
    lennard_jones = load_example("lennard_jones").LennardJones
    module = lennard_jones(cutoff=cutoff, autograd=True).eval()
    graph = exact_graph(cutoff, state, constants)
    runs: dict[str, Run] = {}
    # None for fixed shapes: the list's own capacity is another.
    name = f"steps-{len(state.positions)}"
    for method, model in models(name, module, cutoff, graph, folder, fixed=False).items():
        begun = with_gradients(model, state, constants)
        runs[method] = nested(model, begun, constants, dt)[STEP]
        runs[method](3)
    case = f"engines, a step by autograd, {len(state.positions)} atoms"
    timings = report.time(case, runs, engines=ENGINES)
    if len(state.positions) == 64:
        ratio = timings[SCRIPT].us_median / timings[ANY].us_median
        report.claim(case, f"{SCRIPT} / {ANY}", ratio, 2.5, at_most=False)
