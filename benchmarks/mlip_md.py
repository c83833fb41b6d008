"""Molecular dynamics under a network: torchcall, ASE, torch-sim and a callback in a jitted loop.

Steps of constant energy of 8, 64 and 216 atoms, of one system and of 16 replicas, with one and two
torch threads; energies, forces and stresses in each step. With two threads torchcall's package
computes half of several systems on each of two devices (`torchcall md --devices 2`). Run it in an
environment of the network (`make bench-networks` makes one) with `torch-sim-atomistic`. A run
replaces the cases that it measures in the results file, so it can be done in parts:

    python benchmarks/mlip_md.py --network mace --atoms 8 64 --replicas 1 --threads 1 \\
        --json benchmarks/results/mlip_md_mace.json
    python benchmarks/mlip_md.py --network mace --cold-start --json …     # the first 100 steps

Other codes are missing for these reasons, found with the package index in November 2026. kUPS needs
Python 3.12, and its adapters of torch networks need a CUDA device. mace-jax is not on PyPI, and
jax-md reads the weights of neither network.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

# The second device has half of the systems when there are two threads.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import ase
import numpy as np
import torch
from _codes import (
    Code,
    Maker,
    ase_code,
    callback_code,
    check_energies,
    torch_sim_code,
    torch_sim_model,
    torchcall_code,
)
from _cold_start import cold_start, compile_time
from _harness import Report, parser
from _networks import NETWORKS, Network

import torchcall
from torchcall._command.memory import keep_memory

ASE, TORCH_SIM, CALLBACK = "ASE", "torch-sim", "pure_callback"
PACKAGE, SCRIPT = "torchcall, package", "torchcall, TorchScript"
ENGINES = {
    ASE: "eager",
    TORCH_SIM: "eager",
    CALLBACK: "eager",
    PACKAGE: "AOTInductor",
    SCRIPT: "TorchScript",
}
BUDGET = 120.0  # seconds for the rounds of a case


def replicas_of(network: Network, atoms: int, replicas: int) -> list[ase.Atoms]:
    """Copies of `atoms` atoms near the sites of a crystal, each with its velocities for 300 K.

    Raises:
        SystemExit: `atoms` is not 8 times a cube.
    """
    repeat = round((atoms / 8) ** (1 / 3))
    if 8 * repeat**3 != atoms:
        sys.exit(f"torchcall: --atoms: expected 8 n³, got {atoms}")
    crystal = network.cell() * (repeat, repeat, repeat)
    rng = np.random.default_rng(0)
    crystal.positions += rng.normal(scale=0.03, size=crystal.positions.shape)
    masses = crystal.get_masses()[:, None]
    systems = [crystal.copy() for _ in range(replicas)]
    for system in systems:
        noise = rng.normal(size=(atoms, 3))
        system.set_momenta(noise * np.sqrt(masses * 0.02585))
    return systems


def makers(name: str, network: Network, threads: int, wanted: list[str]) -> dict[str, Maker]:
    """The codes, with their networks loaded once. Prints why a code is left out."""

    def ours(engine: str) -> Any:
        # With one thread a package is serial, which is the fastest on these sizes.
        torch.set_num_threads(1 if engine == "package" else threads)
        model = network.load(engine, verbose=False, threads=1 if engine == "package" else threads)
        torch.set_num_threads(threads)
        return model

    def callback() -> Maker:
        model = ours("eager")
        return lambda systems, every: callback_code(model, systems, every, threads)

    def own(engine: str) -> Callable[[], Maker]:
        def load() -> Maker:
            model = ours(engine)
            # Several systems under a package: a device for each thread.
            most = threads if engine == "package" else 1
            return lambda systems, every: torchcall_code(
                model, systems, every, min(most, len(systems))
            )

        return load

    def native() -> Maker:
        calculator = network.calculator()
        return lambda systems, _: ase_code(calculator, systems)

    def batched() -> Maker:
        model = torch_sim_model(name, network.source)
        return lambda systems, _: torch_sim_code(model, systems)

    loads = {ASE: native, TORCH_SIM: batched, CALLBACK: callback}
    loads |= {SCRIPT: own("script"), PACKAGE: own("package")}
    found: dict[str, Maker] = {}
    for code in wanted:
        try:
            found[code] = loads[code]()
        except ImportError as error:
            print(f"{code} is left out: {str(error).splitlines()[0]}")
    return found


def measure(
    report: Report, title: str, codes: dict[str, Maker], systems: list[ase.Atoms], threads: int
) -> None:
    """Measures one case."""
    case = f"{title}, {len(systems[0])} atoms, systems: {len(systems)}, threads: {threads}"
    first, make = next(iter(codes.items()))
    reference = make(systems, 1)
    seconds = reference.run(1)
    every = int(np.clip(round(0.3 / seconds), 1, 10))
    prepared: dict[str, Code] = {first: reference}
    prepared |= {name: make(systems, every) for name, make in codes.items() if name != first}
    check_energies(prepared)
    for code in prepared.values():
        code.run(every)
        if seconds < 1:  # TorchScript optimises a module in its first calls
            code.run(every)
    rounds = int(np.clip(BUDGET / (len(prepared) * every * seconds), 2, report.options.rounds))
    runs = {name: code.run for name, code in prepared.items()}
    timings = report.time(case, runs, calls=every, most_rounds=rounds, engines=ENGINES)
    if PACKAGE not in timings:
        return
    best = timings[PACKAGE].us_median
    for name in (ASE, TORCH_SIM, CALLBACK):
        if name in timings:
            small = name == ASE and len(systems[0]) == 8
            ratio = timings[name].us_median / best
            report.claim(case, f"{name} / package", ratio, 2.0 if small else 1.0, at_most=False)


def main() -> int:
    """Measures, prints, and merges with the file."""
    arguments = parser(__doc__ or "")
    add = arguments.add_argument
    add("--network", choices=["mace", "sevennet"], required=True)
    add("--atoms", type=int, nargs="+", default=[8, 64, 216], help="of a system: 8 n³")
    add("--replicas", type=int, nargs="+", default=[1, 16], help="systems in a step")
    add("--threads", type=int, nargs="+", default=[1], help="of torch")
    add("--codes", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: all")
    add("--cold-start", action="store_true", help="the first 100 steps in new processes instead")
    add("--compile", action="store_true", help="the compilation of the package instead")
    arguments.set_defaults(rounds=11)
    options = arguments.parse_args()
    keep_memory()  # as the commands; for all codes
    torch.set_num_threads(options.threads[0])
    report = Report(f"{options.network}: molecular dynamics", options)
    network = NETWORKS[options.network]()
    report.part_of = f"mlip_md.py --network {options.network}"
    if options.compile:
        compile_time(report, network)
        return report.finish()
    if options.cold_start:
        for atoms in options.atoms:
            (system,) = replicas_of(network, atoms, 1)
            cold_start(report, network, options.network, system)
        return report.finish()
    for threads in options.threads:
        torch.set_num_threads(threads)
        torchcall.set_num_threads(threads)
        codes = makers(options.network, network, threads, options.codes)
        for atoms in options.atoms:
            for replicas in options.replicas:
                systems = replicas_of(network, atoms, replicas)
                measure(report, network.title, codes, systems, threads)
                report.save()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
