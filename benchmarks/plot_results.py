"""Draws the README's figure from the committed results.

python benchmarks/plot_results.py            # docs/images/call_overhead.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
METHODS = {
    "torch, C++ loop": ("torch alone, C++ loop", "#9aa5b1"),
    "torchcall": ("torchcall", "#c8553d"),
    "wrap_torch2jax": ("wrap_torch2jax", "#7fb2d9"),
    "buffer_callback": ("jax buffer_callback", "#4a8cc2"),
    "pure_callback": ("jax.pure_callback", "#27567e"),
}
CASES = {
    "(a)": "1 array in, 1 out: 300 numbers",
    "(b)": "9 arrays in, 3 out: atom graph, 3000 edges",
    "(d) Lennard-Jones forces, 64 ": "Lennard-Jones forces, 64 atoms",
    "(d) Lennard-Jones forces, 1728 ": "Lennard-Jones forces, 1728 atoms",
}


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel for each case, a bar for each method, µs per call on axes of their own.

    Args:
        document: What `call_overhead.py --json` wrote.
        path: Where to write the figure.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (row["case"], row["method"]): row for row in document["rows"]
    }
    names = list(dict.fromkeys(case for case, _ in rows))
    panels = [
        (name, title)
        for prefix, title in CASES.items()
        for name in names
        if name.startswith(prefix)
    ]
    figure = Figure(figsize=(9.0, 4.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharey=True).ravel()
    for axes, (name, title) in zip(grid, panels, strict=False):
        panel(
            axes,
            title,
            {method: rows[name, method] for method in METHODS if (name, method) in rows},
        )
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    machine, versions = document["machine"], document["versions"]
    figure.suptitle("µs per call inside one jitted loop, shorter is better", color=INK, fontsize=11)
    figure.supxlabel(
        f"{machine['cpu']}, {machine['cores']} cores; jax {versions['jax']}, "
        f"torch {versions['torch']}; medians, whiskers show the interquartile range",
        color=MUTED, fontsize=8,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def panel(axes: Axes, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """One case."""
    base = rows["torchcall"]["us_median"]
    longest = max(row["us_median"] + row["us_iqr"] / 2 for row in rows.values())
    for y, (method, row) in enumerate(rows.items()):
        label, colour = METHODS[method]
        value = row["us_median"]
        axes.barh(y, value, color=colour, height=0.72, label=label)
        axes.errorbar(value, y, xerr=row["us_iqr"] / 2, color=INK, linewidth=0.8, capsize=2)
        ratio = "" if method == "torchcall" else f"   ({value / base:.2g}×)"
        text = f"{value:,.0f}{ratio}" if value >= 100 else f"{value:.3g}{ratio}"
        axes.annotate(text, (value + row["us_iqr"] / 2, y), xytext=(5, 0), va="center",
                      textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [METHODS[method][0] for method in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.3)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(colors=MUTED, labelcolor=INK, length=2, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def main(argv: list[str] | None = None) -> int:
    """Reads the results and draws them."""
    parser = argparse.ArgumentParser(description="Draw the README's figure.")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/call_overhead.json"
    )
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/call_overhead.png")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.results.read_text())
    except (OSError, ValueError) as error:
        print(
            f"torchcall: {options.results}: expected a benchmark's results: {error}",
            file=sys.stderr,
        )
        return 2
    draw(document, options.figure)
    print(options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
