"""Draws the figures of README and docs from the committed results.

    python benchmarks/plot_results.py            # docs/images/call_overhead.png, engines.png, ...

A picture contains the digest of its results: `make_tables.py --check` needs no matplotlib.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from _pictures import PICTURES, digest
from _results import ROOT, Results
from _tables import NETWORKS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
METHODS = {
    "torch, C++ loop": ("torch alone, C++ loop", "#9aa5b1"),
    "torchcall": ("torchcall", "#c8553d"),
    "wrap_torch2jax": ("wrap_torch2jax", "#7fb2d9"),
    "buffer_callback": ("jax buffer_callback", "#4a8cc2"),
    "pure_callback": ("jax.pure_callback", "#27567e"),
}
CALLS = {
    "(a)": "1 array in, 1 out: 300 numbers",
    "(b)": "9 arrays in, 3 out: atom graph, 3000 edges",
    "(d) Lennard-Jones forces, 64 ": "Lennard-Jones forces, 64 atoms",
    "(d) Lennard-Jones forces, 1728 ": "Lennard-Jones forces, 1728 atoms",
}
ENGINES = {
    "torchcall, AOTInductor, fixed shapes": ("package, fixed shapes", "#8f3222"),
    "torchcall, AOTInductor": ("package, any shapes", "#c8553d"),
    "torchcall, TorchScript": ("TorchScript", "#e08b76"),
    "torchcall, eager": ("eager", "#f0c4b8"),
    "buffer_callback": ("eager, buffer_callback", "#4a8cc2"),
    "pure_callback": ("eager, pure_callback", "#27567e"),
}
ENGINE_CASES = {
    "engines, Lennard-Jones by autograd, 64 ": "Lennard-Jones, autograd inside, 64 atoms",
    "engines, message passing, 64 ": "message passing, autograd inside, 64 atoms",
}
STEPS = {
    "torchcall, AOTInductor": ("package", "#c8553d"),
    "torchcall, TorchScript": ("TorchScript", "#e08b76"),
    "torchcall, eager": ("eager", "#f0c4b8"),
}


def calls(found: Mapping[str, Results]) -> Figure:
    """µs per call by each method."""
    return panels(
        found["call_overhead"], CALLS, METHODS, "µs per call inside one jitted loop", "torchcall"
    )


def engines(found: Mapping[str, Results]) -> Figure:
    """µs per call through each engine."""
    base = "torchcall, AOTInductor"
    return panels(
        found["md_loop"], ENGINE_CASES, ENGINES, "µs per call inside one jitted loop", base
    )


def panels(
    found: Results,
    cases: Mapping[str, str],
    methods: Mapping[str, tuple[str, str]],
    title: str,
    base: str,
) -> Figure:
    """A panel for each case, a bar for each method, on axes of their own.

    Args:
        found: The results.
        cases: Beginning of a case and its title.
        methods: Label and colour by method.
        title: The figure's.
        base: The method that ratios refer to.
    """
    rows = (len(cases) + 1) // 2
    figure = blank(0.6 + 2.0 * rows, title, found)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False).ravel()
    for axes, (case, heading) in zip(grid, cases.items(), strict=False):
        listed = {method: found.row(case, method) for method in methods if found.has(case, method)}
        panel(axes, heading, listed, methods, base)
    for axes in grid[len(cases) :]:
        axes.set_visible(False)
    return figure


def panel(
    axes: Axes,
    heading: str,
    rows: Mapping[str, Mapping[str, float]],
    methods: Mapping[str, tuple[str, str]],
    base: str,
) -> None:
    """One case."""
    longest = max(row["us_median"] + row["us_iqr"] / 2 for row in rows.values())
    for y, (method, row) in enumerate(rows.items()):
        value = row["us_median"]
        axes.barh(y, value, color=methods[method][1], height=0.72)
        axes.errorbar(value, y, xerr=row["us_iqr"] / 2, color=INK, linewidth=0.8, capsize=2)
        ratio = "" if method == base else f"   ({value / rows[base]['us_median']:.2g}×)"
        text = f"{value:,.0f}{ratio}" if value >= 100 else f"{value:.3g}{ratio}"
        axes.annotate(text, (value + row["us_iqr"] / 2, y), xytext=(5, 0), va="center",
                      textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [methods[method][0] for method in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.3)
    axes.set_title(heading, fontsize=9, color=INK, loc="left")
    style(axes, "x")


def networks(found: Mapping[str, Results]) -> Figure:
    """Steps of molecular dynamics: how many times as fast as ASE with the network's calculator."""
    title = "steps of molecular dynamics: speed relative to ASE with the network's own calculator"
    figure = blank(3.4, title, *found.values(), shorter=False)
    grid = figure.subplots(1, len(NETWORKS), sharey=False)
    for axes, (network, name) in zip(grid, NETWORKS.items(), strict=True):
        for k, (method, (label, colour)) in enumerate(STEPS.items()):
            for x, atoms in enumerate((8, 64, 216)):
                case = f"{network}, {atoms} atoms, threads: 1, step"
                ratio = found[name].ratio(case, "ASE calculator", method)
                place = x + 0.27 * (k - 1)
                axes.bar(place, ratio, 0.25, color=colour, label=label if x == 0 else None)
                axes.annotate(f"{ratio:.2g}", (place, ratio), xytext=(0, 2), ha="center",
                              textcoords="offset points", color=INK, fontsize=6.5)  # fmt: skip
        axes.axhline(1.0, color=INK, linewidth=0.8)
        axes.set_xticks(range(3), ["8", "64", "216 atoms"], fontsize=8)
        axes.set_title(network, fontsize=9, color=INK, loc="left")
        style(axes, "y")
    grid[0].legend(fontsize=7, frameon=False)
    return figure


def blank(height: float, title: str, *found: Results, shorter: bool = True) -> Figure:
    """A white figure with its title, and the machine and versions below."""
    figure = Figure(figsize=(9.0, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}{', shorter is better' * shorter}", color=INK, fontsize=10)
    where = dict.fromkeys(one.machine() for one in found)
    spread = "; medians, whiskers show the interquartile range" if shorter else "; medians"
    figure.supxlabel(f"{' / '.join(where)}{spread}", color=MUTED, fontsize=7.5)
    return figure


def style(axes: Axes, direction: str) -> None:
    """The look of all panels."""
    axes.tick_params(colors=MUTED, labelcolor=INK, length=2, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(axis="x" if direction == "x" else "y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


DRAW: dict[str, Callable[[Mapping[str, Results]], Figure]] = {
    "call_overhead": calls,
    "engines": engines,
    "networks": networks,
}


def main(argv: list[str] | None = None) -> int:
    """Reads the results and draws them."""
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--only", choices=list(PICTURES), help="draw one")
    options = parser.parse_args(argv)
    options.figures.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else PICTURES:
        paths = {source: options.results / f"{source}.json" for source in PICTURES[name]}
        try:
            found = {source: Results(path) for source, path in paths.items()}
        except (OSError, ValueError, KeyError) as error:
            print(f"torchcall: {name}: expected a benchmark's results: {error}", file=sys.stderr)
            return 2
        figure = options.figures / f"{name}.png"
        marks = {"Description": digest(paths.values())}
        DRAW[name](found).savefig(figure, metadata=marks)
        print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
