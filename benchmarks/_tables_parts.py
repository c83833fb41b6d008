"""More generated tables: the parts of a simulation, transformations, threads and latency."""

from _results import digits, results, seconds, signed, table, times
from _tables import OURS, TABLES, generated, with_source

__all__ = ["TABLES"]


@generated
def neighbor_list() -> str:
    """Searches and steps of neighbour lists."""
    found = results("neighbor_list")
    titles = {
        "search, torchcall": "torchcall, search",
        "search, vesin (C, called from Python, float64)": "vesin, search",
        "search, matscipy (C, called from Python, float64)": "matscipy, search",
        "search, jax-md (sparse)": "jax-md, search",
        "a step, with a search every 15 steps, torchcall": "torchcall, 15 steps a search",
        "a step, with a search every 15 steps, jax-md": "jax-md, 15 steps a search",
        "a step within the skin, torchcall": "torchcall, step with skin",
        "a step within the skin, jax-md": "jax-md, step with skin",
        "a step within the skin and a pair force, torchcall": "torchcall, step and forces",
        "a step within the skin and a pair force, jax-md": "jax-md, step and forces",
    }
    rows = [
        [title, *(digits(found.us(f"{n} atoms", method) / 1e3) for n in (1000, 10000, 100000))]
        for title, method in titles.items()
    ]
    return with_source(table(["ms", "1k atoms", "10k", "100k"], rows), "neighbor_list")


@generated
def transforms() -> str:
    """Derivatives and `vmap` of a call."""
    found = results("transforms")

    def us(case: str, method: str) -> str:
        return digits(found.us(case, method))

    one, many, loop = "value and gradient", "64 calls", "torch, Python loop"
    rows = [
        ["the value", us(one, f"{OURS}, the value alone"), us(one, f"{loop}, the value alone"), ""],
        ["value and gradient", us(one, OURS), us(one, loop), us(one, "wrap_torch2jax")],
        ["64 calls, `vmap`", us(many, OURS), "", f"{us(many, 'wrap_torch2jax')}, by `lax.map`"],
        ['64 calls, `"expand_dims"`', us(many, f"{OURS}, expand_dims"), "", ""],
    ]
    return with_source(table(["µs", OURS, loop, "wrap_torch2jax"], rows), "transforms")


@generated
def parameters() -> str:
    """Parameters as arguments of a call."""
    found, case = results("transforms"), "parameters as arguments"
    rows = [
        [
            "a call",
            *(digits(found.us(case, row)) for row in (OURS, "apply")),
            times(found.ratio(case, "apply", OURS)),
        ],
        [
            "and its gradient by the input",
            *(
                digits(found.us(case, row))
                for row in (f"{OURS}, gradient", "apply, gradient by the input")
            ),
            times(found.ratio(case, "apply, gradient by the input", f"{OURS}, gradient")),
        ],
        [
            "and its gradients by six parameters",
            "",
            digits(found.us(case, "apply, gradients by parameters")),
            "",
        ],
    ]
    return with_source(table(["µs", "wrapper", "`apply`", "ratio"], rows), "transforms")


@generated
def threads() -> str:
    """One and two torch threads."""
    found = results("threads")
    chosen = found.document.get("found", {})
    rows: list[list[str]] = []
    for together in ("", ", on two devices at once"):
        for size in ("64 atoms", "4096 atoms"):
            for engine in ("TorchScript", "AOTInductor"):
                case = f"{engine}, {size}{together}"
                row = [case.replace("AOTInductor", "package")]
                methods = "threads=1", "threads=2", 'threads="auto"'
                row.extend(found.spread(case, method) for method in methods)
                row.append(str(chosen.get(f"{engine}, {size}", {}).get("auto", "")))
                rows.append(row)
    head = ["ms per call", "one thread", "two threads", '`"auto"`', '`"auto"` chose']
    return with_source(table(head, rows), "threads")


@generated
def scaling() -> str:
    """Two devices and two processes."""
    found = results("scaling")
    rows: list[list[str]] = []
    alone = "one device in each of two unconnected processes"
    for engine in ("TorchScript", "eager"):
        case = found.case(f"16 replicas of 64 atoms, {engine}")
        one = found.us(case, "one device")
        for title, method, work in (
            ("one device", "one device", 1),
            ("two devices", "two devices", 1),
            ("two processes, one device each", "two processes", 1),
            ("two unconnected processes, each with the work of one device", alone, 2),
        ):
            us = found.us(case, method)
            rows.append([engine, title, digits(us), times(work * one / us)])
    head = ["16 replicas of 64 atoms", "", "µs per step", "throughput / one device's"]
    return with_source(table(head, rows), "scaling")


@generated
def latency() -> str:
    """What a user waits for."""
    found = results("latency")
    titles = {
        "`import torchcall.mliap`, after jax and torch": "import torchcall.mliap",
        "first `neighbor_list(...).allocate`, 500 atoms": "first neighbor_list(...).allocate, 500 ",
        "the same, 100 000 atoms": "first neighbor_list(...).allocate, 100000 ",
        "first `run_chunks` of 50 steps": "first run_chunks of 50 steps",
        "the same, with JAX's persistent cache": "first run_chunks of 50 steps, JAX's cache warm",
        "eager `value_and_grad(energy)`, first call": "eager value_and_grad(energy), first",
        "the same, second call": "eager value_and_grad(energy), second",
        "eager `energy_and_gradients`, second call": "eager energy_and_gradients, second",
    }
    rows = [
        [title, seconds(found.us(case, OURS)), seconds(found.row(case, OURS)["us_iqr"])]
        for title, case in titles.items()
    ]
    return with_source(table(["500 argon atoms", "time", "IQR"], rows), "latency")


@generated
def script_options() -> str:
    """Options of TorchScript."""
    found = results("script_options")
    options = ["freeze=True", "optimize_for_inference", "profiling executor, C++ loop"]
    cases = {
        "Lennard-Jones, autograd inside": "Lennard-Jones by autograd, 64 atoms",
        "Lennard-Jones, by formulas": "Lennard-Jones by formulas, 64 atoms",
        "message passing": "message passing, 64 atoms",
    }
    rows = [
        [
            title,
            f"{digits(found.us(case, 'as it is'))} µs",
            *(times(found.ratio(case, option, "as it is")) for option in options),
        ]
        for title, case in cases.items()
    ]
    mace = results("mace_engines")
    case, base = mace.case("ScaleShiftMACE, 64 atoms"), f"{OURS}, TorchScript"
    methods = [f"{base}, freeze=True", f"{base}, optimize_for_inference"]
    methods.append("TorchScript, profiling executor, C++ loop")
    ms = f"{digits(mace.us(case, base) / 1e3)} ms"
    rows.append(["ScaleShiftMACE", ms, *(times(mace.ratio(case, m, base)) for m in methods)])
    head = ["", "as it is", "`freeze=True`", "`optimize_for_inference`", "profiling executor"]
    return with_source(table(head, rows), "script_options", "mace_engines")


@generated
def step_shares() -> str:
    """The parts of a step."""
    found = results("step_shares")
    parts = {
        "the model in a C++ loop": ["model, in a C++ loop"],
        "call: casts of indices, checks, copies": ["call: bridge, casts, checks"],
        "padded graph": ["graph and padding"],
        "list within its skin, and searches": ["list within its skin", "searches"],
    }
    sizes = (8, 64, 500, 4000, 32000)
    share = "share of a step: Lennard-Jones, {} atoms"
    rows = [
        [
            title,
            *(digits(sum(found.us(share.format(n), part) for part in names)) for n in sizes),
        ]
        for title, names in parts.items()
    ]
    sums = [found.us(share.format(n), "sum, a step") for n in sizes]
    listed = [part for names in parts.values() for part in names]
    rest = [
        total - sum(found.us(share.format(n), part) for part in listed)
        for n, total in zip(sizes, sums, strict=True)
    ]
    rows.append(["loop, integrator, remainder", *map(signed, rest)])
    rows.append(["a step", *map(digits, sums)])
    ratios = [
        times(found.ratio(share.format(n), "sum, a step", "model, in a C++ loop")) for n in sizes
    ]
    rows.append(["a step / the model", *ratios])
    head = ["µs", *(f"{n:,} atoms".replace(",", " ") for n in sizes)]
    return with_source(table(head, rows), "step_shares")


@generated
def narrowing() -> str:
    """The cost of spare edge slots."""
    found = results("md_loop")
    rows: list[list[str]] = []
    for size in ("512", "4096"):
        case, exact = f"narrowing, Lennard-Jones, {size} atoms", "exact graph"
        spare = "twice the edge slots"
        cells = [
            f"{digits(found.us(case, method))} ({times(found.ratio(case, method, exact))} ×)"
            for method in (spare, f"{spare}, narrow=False")
        ]
        rows.append([f"{size} atoms", digits(found.us(case, exact)), *cells])
    head = ["µs, Lennard-Jones", "exact graph", "twice the edge slots", "the same, not narrowed"]
    return table(head, rows)


@generated
def merging() -> str:
    """Systems in one call."""
    found = results("md_loop")
    rows: list[list[str]] = []
    for title in ("Lennard-Jones", "Stillinger-Weber", "message passing"):
        case = f"64 systems of 64 atoms and * edges, {title}"
        merged, alone = (
            found.us(case, method) for method in ("merged by vmap", "one after another")
        )
        rows.append([title, digits(merged / 1e3), digits(alone / 1e3), times(alone / merged)])
    head = ["ms, 64 systems of 64 atoms", "merged by `vmap`", "one after another", "ratio"]
    return with_source(table(head, rows), "md_loop")
