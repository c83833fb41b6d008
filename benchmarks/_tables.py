"""The generated tables of README and docs: from results files to Markdown.

Each function is a table's text; its name is that of the table in the documents' markers.
"""

from collections.abc import Callable

from _results import digits, results, table, times

TABLES: dict[str, Callable[[], str]] = {}
CALLS = {
    "`x * 2`, 300 float32": "(a)",
    "9 arrays in, 3 out (dicts), 3000 edges": "(b)",
    "`x * 2`, 300 000 float32": "(c) x*2, 3e5",
    "`x * 2`, 30 million float32": "(c) x*2, 3e7",
    "Lennard-Jones forces, 64 atoms": "(d) Lennard-Jones forces, 64 ",
    "Lennard-Jones forces, 1728 atoms": "(d) Lennard-Jones forces, 1728 ",
}
SHORT = [0, 1, 4, 5]
NETWORKS = {
    "CHGNet 0.3.0": "networks_chgnet",
    "MACE 16x0e + 16x1o": "networks_mace",
    "NequIP, 2 layers of 16": "networks_nequip",
    "7net-0": "networks_sevennet",
}
TWO_THREADS = {name: NETWORKS[name] for name in ("MACE 16x0e + 16x1o", "NequIP, 2 layers of 16")}
TORCH, OURS = "torch, C++ loop", "torchcall"
PEERS = {
    "`buffer_callback`": "buffer_callback",
    "wrap_torch2jax": "wrap_torch2jax",
    "`pure_callback`": "pure_callback",
}


def generated(make: Callable[[], str]) -> Callable[[], str]:
    """Adds a table under its function's name."""
    TABLES[make.__name__.replace("_", "-")] = make
    return make


def with_source(text: str, *names: str) -> str:
    """A table and how it was measured."""
    return "\n\n".join([text, "\n".join(results(name).where() for name in names)])


def _calls(chosen: list[str]) -> str:
    found = results("call_overhead")

    def cell(case: str, method: str) -> str:
        return f"{digits(found.us(case, method))} ({times(found.ratio(case, method, OURS))} ×)"

    rows = [
        [
            title,
            digits(found.us(CALLS[title], TORCH)),
            f"**{digits(found.us(CALLS[title], OURS))}**",
            times(found.ratio(CALLS[title], OURS, TORCH, least=True)),
            *(cell(CALLS[title], method) for method in PEERS.values()),
        ]
        for title in chosen
    ]
    head = ["µs per call", TORCH, "**torchcall**", "torchcall / C++, least times", *PEERS]
    return with_source(table(head, rows), "call_overhead")


@generated
def calls() -> str:
    """All cases of `call_overhead.py`."""
    return _calls(list(CALLS))


@generated
def calls_short() -> str:
    """The README's cases."""
    return _calls([list(CALLS)[k] for k in SHORT])


@generated
def engines() -> str:
    """A call, and a step, through each engine."""
    found = results("md_loop")
    methods = ["TorchScript", "AOTInductor", "AOTInductor, fixed shapes", "eager"]
    cases = {
        "Lennard-Jones, autograd inside": "engines, Lennard-Jones by autograd, 64 ",
        "Lennard-Jones, by formulas": "engines, Lennard-Jones by formulas, 64 ",
        "message passing": "engines, message passing, 64 ",
    }
    rows = [
        [
            title,
            *(digits(found.us(case, f"{OURS}, {method}")) for method in methods),
            *(digits(found.us(case, peer)) for peer in ("buffer_callback", "pure_callback")),
        ]
        for title, case in cases.items()
    ]
    for size in ("64", "500"):
        case = f"engines, a step by autograd, {size} "
        steps = [digits(found.us(case, f"{OURS}, {methods[k]}")) for k in (0, 1, 3)]
        title = f"a step of dynamics, {size} atoms, autograd inside"
        rows.append([title, *steps[:2], "", steps[2], "", ""])
    head = ["µs, 64 atoms", "TorchScript", "package, any shapes", "package, fixed shapes", "eager"]
    head += ["`buffer_callback`, eager", "`pure_callback`, eager"]
    return with_source(table(head, rows), "md_loop")


@generated
def mace_engines() -> str:
    """A larger network through each engine."""
    found = results("mace_engines")
    case = found.case("ScaleShiftMACE, 64 atoms")
    pairs = {
        "eager": ("eager", "torchcall, eager"),
        "TorchScript": ("TorchScript", "torchcall, TorchScript"),
        "package": ("torch, C++ loop, AOTInductor", "torchcall, AOTInductor"),
    }
    rows = [
        [f"ms, {name}", *(digits(found.us(case, row) / 1e3) for row in pair)]
        for name, pair in pairs.items()
    ]
    head = ["ScaleShiftMACE, 64 atoms, float32, one thread", "called by torch", "by torchcall"]
    return with_source(table(head, rows), "mace_engines")


@generated
def networks() -> str:
    """Steps of molecular dynamics with networks, beside ASE."""
    return _steps(NETWORKS, 1)


@generated
def two_threads() -> str:
    """The same with two threads."""
    return _steps(TWO_THREADS, 2)


def _steps(files: dict[str, str], threads: int) -> str:
    rows: list[list[str]] = []
    for title, name in files.items():
        found = results(name)
        for atoms in (8, 64, 216):
            case = found.case(f"{title}, {atoms} atoms, threads: {threads}, step")
            ase = found.us(case, "ASE calculator") / 1e3
            row = [title, str(atoms), digits(ase)]
            for engine in ("eager", "TorchScript", "AOTInductor"):
                ms = found.us(case, f"torchcall, {engine}") / 1e3
                row.append(f"{digits(ms)} ({times(ase / ms)} ×)")
            rows.append(row)
    head = ["ms per step", "atoms", "ASE", "eager", "TorchScript", "package"]
    return with_source(table(head, rows), *files.values())


@generated
def md_loop() -> str:
    """Steps of liquid argon."""
    found = results("md_loop")
    methods = {
        "torch, C++ loop, the potential alone": "torch, C++ loop, forward only",
        "**torchcall**": OURS,
        **PEERS,
    }
    rows = [
        [f"{size} atoms", *(digits(found.us(f"md, {size} atoms", row)) for row in methods.values())]
        for size in (64, 500, 4000)
    ]
    return with_source(table(["µs per step", *methods], rows), "md_loop")


CODES = {
    "ASE": "ASE",
    "torch-sim": "torch-sim",
    "`pure_callback`": "pure_callback",
    "torchcall, TorchScript": "torchcall, TorchScript",
    "**torchcall, package**": "torchcall, package",
}
DYNAMICS = {"MACE 16x0e + 16x1o": "mlip_md_mace", "7net-0": "mlip_md_sevennet"}


def _dynamics(threads: int, systems: tuple[int, ...]) -> str:
    """ms per step of each code, and in brackets the times that its package is faster."""
    rows: list[list[str]] = []
    for title, name in DYNAMICS.items():
        found = results(name)
        for count in systems:
            for atoms in (8, 64, 216):
                case = f"{title}, {atoms} atoms, systems: {count}, threads: {threads}"
                if not found.has_case(case):
                    continue
                best = found.us(case, "torchcall, package")
                cells = [
                    f"{digits(found.us(case, code) / 1e3)} ({times(found.us(case, code) / best)} ×)"
                    for code in list(CODES.values())[:-1]
                ]
                rate = digits(1e6 * atoms * count / best)
                rows.append(
                    [title, f"{count} × {atoms}", *cells, f"**{digits(best / 1e3)}**", rate]
                )
    head = ["ms per step", "systems × atoms", *CODES, "atom·steps/s of the package"]
    return table(head, rows)


@generated
def mlip_md() -> str:
    """Molecular dynamics under networks, by several codes."""
    return with_source(_dynamics(1, (1, 16)), *DYNAMICS.values())


@generated
def mlip_md_threads() -> str:
    """The same with two threads."""
    return _dynamics(2, (1, 16))


@generated
def cold_start() -> str:
    """From the start of a process to its first steps."""
    rows: list[list[str]] = []
    for name in DYNAMICS.values():
        for case, codes in results(name).document.get("found", {}).items():
            if not case.startswith("cold start, "):
                continue
            for code, row in codes.items():
                ahead = row.get("ahead_after")
                cells = [digits(row["start_s"]), digits(row["step_ms"])]
                cells.append("" if ahead is None else f"{ahead:.0f} steps")
                rows.append([case.removeprefix("cold start, "), code, *cells])
    head = ["from a cold start", "", "s until 10 steps", "ms per step", "ahead of ASE after"]
    return table(head, rows)


@generated
def md_files() -> str:
    """`torchcall md` beside its bare loop and ASE."""
    found = results("md_files")
    titles = {
        "a jitted loop alone": "loop alone",
        "`torchcall md --every 10`": "torchcall md, --every 10",
        "`torchcall md --every 100`": "torchcall md, --every 100",
        "ASE, torchcall's calculator": "ASE, torchcall's calculator",
    }
    argon = found.case("argon, 500 atoms")
    rows = [[title, found.spread(argon, method)] for title, method in titles.items()]
    return with_source(table(["ms per step", "argon, 500 atoms"], rows), "md_files")
