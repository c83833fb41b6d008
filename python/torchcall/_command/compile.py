"""Compile a potential into an AOTInductor package (.pt2).

MODULE is FILE.py:FACTORY or PACKAGE.MODULE:FACTORY, a function without arguments that returns a
torch.nn.Module whose forward takes an AtomGraphInput and returns energies; or, with --allow-pickle,
a file made by torch.save(module). See docs/packages.md.
"""

import argparse

from torchcall._command.parsing import number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compile`."""
    add = parser.add_argument
    add("module", metavar="MODULE", help="source of the module, see above")
    add("path", metavar="PACKAGE", help="output file, a name ending in .pt2")
    add("--example", required=True, metavar="FILE", help="a structure file that ASE can read")
    add("--cutoff", required=True, type=number(above=0), metavar="Å", help="the model's")
    add(
        "--dtype",
        choices=["float32", "float64"],
        help="cast to it (default: the weights' dtype)",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--second-derivatives", action="store_true", help="also for jax.hessian(energy)")
    add("--parallel", action="store_true", help="divide loops among threads (CPU)")
    shapes = parser.add_mutually_exclusive_group()
    for name, text in (
        ("static", "compile for the example's padded sizes only"),
        ("dynamic", "compile for any sizes, or fail (default: any sizes if possible)"),
    ):
        shapes.add_argument(f"--{name}", dest="shapes", action="store_const", const=name, help=text)
    add("--no-cache", action="store_true", help="compile even if the package is cached")
    add("--allow-pickle", action="store_true", help="accept a pickled module as MODULE")


def run(options: argparse.Namespace) -> int:
    """Compiles the module."""
    from torchcall._command._compile_module import compile_module

    return compile_module(options)
