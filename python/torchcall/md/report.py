"""What a run reports: drift, temperature, pressure; the plot; the summary as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchcall._command.files import write_output
from torchcall.md.files import LOG_COLUMNS

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_TOTAL, _POTENTIAL, _KINETIC, _PRESSURE = "#1f2933", "#2f6fb0", "#c8553d", "#4f7f52"


def read_log(path: Path) -> dict[str, np.ndarray]:
    """The columns of a log, each (F, R)."""
    table = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2)
    replicas = int(table[:, LOG_COLUMNS.index("replica")].max()) + 1
    return {name: table[:, k].reshape(-1, replicas) for k, name in enumerate(LOG_COLUMNS)}


@dataclass(frozen=True)
class Summary:
    """Energy conservation, temperature and pressure of a run: means over replicas.

    `drift` is the slope of a linear fit to the conserved quantity, in meV/atom/ps, `fluctuation`
    the standard deviation around the fit, in meV/atom; NaN where nothing is conserved. Temperature
    in K and pressure in GPa are means with standard deviations, of the second half of the run.
    """

    drift: float
    fluctuation: float
    temperature: float
    temperature_std: float
    pressure: float
    pressure_std: float
    picoseconds: float

    @classmethod
    def of(cls, rows: dict[str, np.ndarray], n_atoms: int) -> Summary:
        """From the columns of a log."""
        times = rows["time_ps"][:, 0]
        conserved = rows["conserved_ev"] * 1e3 / n_atoms
        drift = fluctuation = float("nan")
        if len(times) > 1:
            fits = [np.polyfit(times, column, 1) for column in conserved.T]
            drift = float(np.mean([slope for slope, _ in fits]))
            fluctuation = float(
                np.mean(
                    [
                        np.std(column - np.polyval(fit, times))
                        for fit, column in zip(fits, conserved.T, strict=True)
                    ]
                )
            )
        late = slice(len(times) // 2, None)
        temperature, pressure = rows["temperature_k"][late], rows["pressure_gpa"][late]
        return cls(
            drift,
            fluctuation,
            float(temperature.mean()),
            float(temperature.std()),
            float(pressure.mean()),
            float(pressure.std()),
            float(times[-1]),
        )

    def text(self) -> str:
        """Some lines for people."""
        lines = []
        if np.isfinite(self.drift):
            lines.append(
                f"  energy drift    {self.drift:+.2e} meV/atom/ps, fluctuation "
                f"{self.fluctuation:.1e} meV/atom"
            )
        lines.append(f"  temperature     {self.temperature:.1f} ± {self.temperature_std:.1f} K")
        if np.isfinite(self.pressure):
            lines.append(f"  pressure        {self.pressure:.3g} ± {self.pressure_std:.2g} GPa")
        return "\n".join(lines)


def draw(
    path: Path, rows: dict[str, np.ndarray], summary: Summary, title: str, n_atoms: int
) -> None:
    """Plots energies, the conserved quantity, temperature and pressure against time.

    Raises:
        CommandError: The file cannot be written.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Any] = [_energies]
    if np.isfinite(rows["conserved_ev"]).any():
        panels.append(_drift)
    panels.append(_temperature)
    if np.isfinite(rows["pressure_gpa"]).any():
        panels.append(_pressure)
    figure = Figure(
        figsize=(8.0, 2.0 * len(panels) + 0.6), dpi=150, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    found: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    times = rows["time_ps"][:, 0]
    for panel, axes in zip(panels, found[:, 0], strict=True):
        panel(axes, times, rows, summary, 1e3 / n_atoms)
        if times[-1] > times[0]:
            axes.set_xlim(times[0], times[-1])
        axes.grid(color=_GRID, linewidth=0.8)
        axes.tick_params(colors=_MUTED, labelcolor=_INK, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_MUTED)
    found[-1, 0].set_xlabel("time [ps]")
    figure.suptitle(title, color=_INK, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_output("--plot", path, picture.getvalue())


def _energies(axes: Any, times: Any, rows: Any, summary: Summary, scale: float) -> None:
    del summary
    for name, colour in (("potential", _POTENTIAL), ("kinetic", _KINETIC), ("total", _TOTAL)):
        values = (rows[f"{name}_ev"] - rows[f"{name}_ev"][0]) * scale
        lines = axes.plot(times, values, color=colour, linewidth=1.1)
        lines[0].set_label(name)
    axes.set_ylabel("energy − start\n[meV/atom]")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    axes.legend(loc="upper right", ncols=3, frameon=False, labelcolor=_INK)


def _drift(axes: Any, times: Any, rows: Any, summary: Summary, scale: float) -> None:
    values = (rows["conserved_ev"] - rows["conserved_ev"][0]) * scale * 1e3
    axes.plot(times, values, color=_TOTAL, linewidth=0.8)
    axes.set_ylabel("conserved\n[µeV/atom]")
    axes.set_title(f"drift {summary.drift:+.1e} meV/atom/ps", fontsize=9, color=_MUTED, loc="right")


def _temperature(axes: Any, times: Any, rows: Any, summary: Summary, scale: float) -> None:
    del scale
    axes.plot(times, rows["temperature_k"], color=_KINETIC, linewidth=1.1)
    mean = f"{summary.temperature:.1f} ± {summary.temperature_std:.1f} K (second half)"
    axes.set_title(mean, fontsize=9, color=_MUTED, loc="right")
    axes.set_ylabel("temperature\n[K]")


def _pressure(axes: Any, times: Any, rows: Any, summary: Summary, scale: float) -> None:
    del scale
    axes.plot(times, rows["pressure_gpa"], color=_PRESSURE, linewidth=1.1)
    mean = f"{summary.pressure:.3g} ± {summary.pressure_std:.2g} GPa (second half)"
    axes.set_title(mean, fontsize=9, color=_MUTED, loc="right")
    axes.set_ylabel("pressure\n[GPa]")


def write_json(path: Path, summary: Summary, rows: list[dict[str, Any]], **run: Any) -> None:
    """Writes the summary, and timings; NaN becomes null.

    Raises:
        CommandError: The file cannot be written.
    """
    from torchcall.demo._timing import machine, versions

    values = asdict(summary) | run
    result = {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in values.items()
    }
    document = {"machine": machine(), "versions": versions(), "rows": rows, "result": result}
    write_output("--json", path, (json.dumps(document, indent=2) + "\n").encode())
