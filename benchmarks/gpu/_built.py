"""Runs a program with the torchcall in `$TORCHCALL_BUILT` instead of an installed one.

    TORCHCALL_BUILT=build/gpu python benchmarks/gpu/_built.py benchmarks/gpu/md.py --quick
    TORCHCALL_BUILT=build/gpu python benchmarks/gpu/_built.py -m pytest tests/gpu

The finder of an editable install comes before every folder of the path, so it is removed. Without
the variable nothing changes. `command` gives the command line for child processes.
"""

import os
import runpy
import sys
from pathlib import Path


def use_built() -> None:
    """Makes `import torchcall` find the build that `$TORCHCALL_BUILT` names.

    Raises:
        SystemExit: There is no torchcall in it.
    """
    built = os.environ.get("TORCHCALL_BUILT")
    if not built:
        return
    folder = Path(built).resolve()
    if not (folder / "torchcall").is_dir():
        raise SystemExit(f"torchcall: TORCHCALL_BUILT: expected a build in {folder}, found none")
    sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
    sys.path.insert(0, str(folder))
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in rest:  # for children that do not come through here
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, rest)])


def command(*arguments: object) -> list[str]:
    """The command line that runs `SCRIPT ARGUMENTS` or `-m MODULE ARGUMENTS` in this way."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]


def main() -> None:
    """Runs the program that the command line names."""
    use_built()
    if sys.argv[1:2] == ["-m"]:
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
