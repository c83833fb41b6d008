"""Draws the figure of docs/gpu.md from a GPU's results.

python benchmarks/gpu/plot.py            # gpu_md.json → docs/images/gpu_md.png
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))  # for the modules of benchmarks/
from plot_results import GRID, INK, MUTED, ROOT

LINES = {
    "pure_callback, TorchScript": ("pure_callback", "#27567e", "-"),
    "buffer_callback, TorchScript": ("buffer_callback", "#4a8cc2", "-"),
    "torch, Python loop, TorchScript": ("torch alone, Python loop", "#9aa5b1", "-"),
    "torch, CUDA graph, TorchScript": ("torch alone, CUDA graph", "#9aa5b1", "--"),
    "torchcall, uncaptured, TorchScript": ("torchcall, uncaptured", "#e0a091", "-"),
    "torchcall, captured, TorchScript": ("torchcall, captured", "#c8553d", "-"),
    "torch, CUDA graph, AOTInductor": ("torch alone, CUDA graph, package", "#6b7785", ":"),
    "torchcall, captured, AOTInductor": ("torchcall, captured, package", "#7a2414", "-"),
}
Series = dict[str, list[tuple[int, float]]]


def series_of(document: dict[str, Any]) -> dict[tuple[str, str], Series]:
    """By kind and potential, by method, (atoms, µs)."""
    result: dict[tuple[str, str], Series] = defaultdict(lambda: defaultdict(list))
    for row in document["rows"]:
        match = re.match(r"(calls|steps), (.*?), (\d+) atoms", row["case"])
        if match and row["method"] in LINES:
            points = result[match[1], match[2]][row["method"]]
            points.append((int(match[3]), row["us_median"]))
    return result


def panel(axes: Axes, title: str, series: Series) -> None:
    """µs over atoms, both logarithmic."""
    for method, (label, colour, style) in LINES.items():
        if method in series:
            atoms, us = zip(*sorted(series[method]), strict=True)
            axes.plot(atoms, us, style, color=colour, label=label, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(colors=MUTED, labelcolor=INK, length=2, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel for each kind and potential."""
    found = series_of(document)
    names = sorted(found)
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.0, 3.4 * rows + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (kind, potential) in zip(grid, names, strict=False):
        what = "one call" if kind == "calls" else "one step"
        panel(axes, f"{potential}: {what}", found[kind, potential])
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=7, frameon=False)  # fmt: skip
    machine, versions = document["machine"], document["versions"]
    figure.suptitle(
        f"µs over atoms in one jitted loop; {machine['gpu']}, jax {versions['jax']}, "
        f"torch {versions['torch']}", color=INK, fontsize=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Reads the results and draws them."""
    parser = argparse.ArgumentParser(description="Draw the figure of docs/gpu.md.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu_md.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/gpu_md.png")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.results.read_text())
    except (OSError, ValueError) as error:
        print(f"torchcall: {options.results}: expected results: {error}", file=sys.stderr)
        return 2
    if "gpu" not in document.get("machine", {}) or not series_of(document):
        print(f"torchcall: {options.results}: expected results of a GPU", file=sys.stderr)
        return 2
    draw(document, options.figure)
    print(options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
