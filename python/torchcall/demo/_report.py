"""Results of a run: energy drift and temperature, timing table, plot, JSON file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchcall.demo._system import DemoError, require
from torchcall.demo._timing import Timing, machine, versions

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_TOTAL, _POTENTIAL, _KINETIC = "#1f2933", "#2f6fb0", "#c8553d"


@dataclass(frozen=True)
class Observables:
    """Energy conservation and temperature of a run.

    `drift` is the slope of a linear fit to the total energy, in meV/atom/ps. `fluctuation` is the
    standard deviation around the fit, in meV/atom. Temperatures are in K, from `3 n − 3` degrees of
    freedom.
    """

    drift: float
    fluctuation: float
    temperature: float
    temperature_std: float
    times: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    temperatures: np.ndarray

    @classmethod
    def of(
        cls, potential: np.ndarray, kinetic: np.ndarray, *, n_atoms: int, dt: float, kb: float
    ) -> "Observables":
        """From energies per step in eV, `dt` in fs and Boltzmann's constant in eV/K."""
        potential, kinetic = np.asarray(potential, float), np.asarray(kinetic, float)
        times = dt * 1e-3 * np.arange(1, len(potential) + 1)
        total = (potential + kinetic) * 1e3 / n_atoms
        slope, start = np.polyfit(times, total, 1) if len(times) > 1 else (0.0, total[0])
        temperatures = 2.0 * kinetic / ((3 * n_atoms - 3) * kb)
        return cls(
            drift=float(slope),
            fluctuation=float(np.std(total - slope * times - start)),
            temperature=float(temperatures.mean()),
            temperature_std=float(temperatures.std()),
            times=times,
            potential=potential * 1e3 / n_atoms,
            kinetic=kinetic * 1e3 / n_atoms,
            temperatures=temperatures,
        )


def timing_table(timings: dict[str, Timing]) -> str:
    """Microseconds per step of each method, and the ratio to torchcall."""
    base = timings["torchcall"].us_median
    lines = [f"  {'one step through':<26}{'µs':>9}{'± IQR':>9}{'':>4}ratio"]
    for name, timing in timings.items():
        ratio = "1" if name == "torchcall" else f"{timing.us_median / base:.2f} × torchcall's time"
        lines.append(f"  {name:<26}{timing.us_median:>9.0f}{timing.us_iqr:>9.0f}{'':>4}{ratio}")
    return "\n".join(lines)


def draw(path: Path, observables: Observables, title: str) -> None:
    """Plots energies and temperature against time.

    Raises:
        DemoError: If matplotlib is missing or the file cannot be written.
    """
    require("matplotlib", "the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    energy, rest, heat = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.4, 2])
    times, total = observables.times, observables.potential + observables.kinetic
    curves = (
        (observables.potential - observables.potential[0], _POTENTIAL, 1.1, "potential"),
        (observables.kinetic - observables.kinetic[0], _KINETIC, 1.1, "kinetic"),
        (total - total[0], _TOTAL, 1.8, "total"),
    )
    for values, colour, width, label in curves:
        energy.plot(times, values, color=colour, linewidth=width, label=label)
    energy.set_ylabel("energy − start\n[meV/atom]")
    energy.legend(loc="upper right", ncols=3, frameon=False, labelcolor=_INK)
    low, high = energy.get_ylim()
    energy.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    rest.plot(times, (total - total[0]) * 1e3, color=_TOTAL, linewidth=0.8)
    rest.set_ylabel("total\n[µeV/atom]")
    rest.set_title(
        f"drift {observables.drift:+.1e} meV/atom/ps", fontsize=9, color=_MUTED, loc="right"
    )
    heat.plot(times, observables.temperatures, color=_KINETIC, linewidth=1.1)
    heat.axhline(observables.temperature, color=_MUTED, linewidth=0.9, linestyle=(0, (5, 3)))
    mean = f"{observables.temperature:.1f} ± {observables.temperature_std:.1f} K"
    heat.set_title(mean, fontsize=9, color=_MUTED, loc="right")
    heat.set_ylabel("temperature\n[K]")
    heat.set_xlabel("time [ps]")
    for axes in (energy, rest, heat):
        axes.set_xlim(0.0, times[-1])
        axes.grid(color=_GRID, linewidth=0.8)
        axes.tick_params(colors=_MUTED, labelcolor=_INK, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_MUTED)
    figure.suptitle(title, color=_INK, fontsize=11)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DemoError(f"--picture {path}: cannot write the file: {error}") from error


def write_json(
    path: Path, case: str, observables: Observables, timings: dict[str, Timing], **run: Any
) -> None:
    """Writes timings in the format of the benchmarks, and the run's observables.

    Raises:
        DemoError: If the file cannot be written.
    """
    rows = [
        {"case": case, "method": name, "engine": "TorchScript",
         "us_median": timing.us_median, "us_iqr": timing.us_iqr, "n": timing.n}
        for name, timing in timings.items()
    ]  # fmt: skip
    result = {
        "drift_mev_per_atom_per_ps": observables.drift,
        "fluctuation_mev_per_atom": observables.fluctuation,
        "temperature_k": observables.temperature,
        "temperature_std_k": observables.temperature_std,
        **run,
    }
    document = {"machine": machine(), "versions": versions(), "rows": rows, "result": result}
    try:
        path.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise DemoError(
            f"--json {path}: cannot write the file: {error.strerror or error}"
        ) from error
