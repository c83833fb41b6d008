"""Sentences of the documents that the committed results must support."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from _results import results
from _tables import NETWORKS, OURS, TORCH


@dataclass(frozen=True)
class Claim:
    """A sentence, and the values that it states a range of.

    Attributes:
        document: Path of the document.
        sentence: Its words; line breaks in the document do not matter.
        values: Ratios from the results.
        least, most: Their range.
    """

    document: str
    sentence: str
    values: Callable[[], Iterable[float]]
    least: float = -inf
    most: float = inf


SMALL = ["(a)", "(b)", "(d) Lennard-Jones forces, 64 ", "(d) Lennard-Jones forces, 1728 "]
PERFORMANCE = "docs/performance.md"


def calls(method: str, base: str, cases: Iterable[str]) -> Callable[[], list[float]]:
    """Ratios of `call_overhead`."""
    found = results("call_overhead")
    return lambda: [found.ratio(case, method, base, least=True) for case in cases]


def beyond_copies() -> list[float]:
    """The copy of an output, as a share of what a call costs beyond the model."""
    found = results("call_overhead")
    return [
        found.us(case, "memcpy of the output") / (found.us(case, OURS) - found.us(case, TORCH))
        for case in ("(c) x*2, 3e5", "(c) x*2, 3e7")
    ]


def md_loop(case: str, method: str, base: str) -> float:
    """A ratio of `md_loop`."""
    return results("md_loop").ratio(case, method, base)


def of_packages() -> list[float]:
    """How many times as fast as TorchScript packages are, autograd inside."""
    script, package = f"{OURS}, TorchScript", f"{OURS}, AOTInductor"
    cases = "Lennard-Jones by autograd, 64 atoms", "message passing"
    return [md_loop(f"engines, {case}", script, package) for case in cases]


def of_networks(engine: str) -> list[float]:
    """How many times as fast as ASE a step is, for each network and size."""
    return [
        results(name).ratio(
            f"{network}, {atoms} atoms, threads: 1, step", "ASE calculator", f"{OURS}, {engine}"
        )
        for network, name in NETWORKS.items()
        for atoms in (8, 64, 216)
    ]


def of_lists(ours: str, theirs: Iterable[str]) -> list[float]:
    """How many times as long other neighbour lists take."""
    found = results("neighbor_list")
    return [
        found.ratio(f"{n} atoms", other, ours) for n in (1000, 10000, 100000) for other in theirs
    ]


def narrowed(method: str) -> list[float]:
    """The cost of spare slots."""
    return [md_loop(f"narrowing, * {size} atoms", method, "exact graph") for size in (512, 4096)]


def merged(model: str) -> list[float]:
    """How many times as fast one call of 64 systems is."""
    case = f"64 systems of 64 atoms and * edges, {model}"
    return [md_loop(case, "one after another", "merged by vmap")]


def second_thread(*cases: str) -> list[float]:
    """Time with two threads over time with one."""
    found = results("threads")
    return [
        found.ratio(f"{engine}, {case}", "threads=2", "threads=1")
        for engine in ("TorchScript", "AOTInductor")
        for case in cases
    ]


def parameters() -> list[float]:
    """The cost of parameters as arguments."""
    found, case = results("transforms"), "parameters as arguments"
    return [
        found.ratio(case, "apply", OURS),
        found.ratio(case, "apply, gradient by the input", f"{OURS}, gradient"),
    ]


CLAIMS = [
    Claim(
        PERFORMANCE,
        "For models whose outputs are small a call takes at most a fifth longer than the model",
        calls(OURS, TORCH, SMALL),
        most=1.2,
    ),
    Claim(
        PERFORMANCE,
        "at least four times as fast as through `buffer_callback` and wrap_torch2jax",
        lambda: [
            results("call_overhead").ratio(case, peer, OURS)
            for case in ("(a)", "(b)")
            for peer in ("buffer_callback", "wrap_torch2jax")
        ],
        least=4,
    ),
    Claim(
        PERFORMANCE,
        "and 25 times as fast as through `pure_callback`",
        calls("pure_callback", OURS, ["(a)", "(b)"]),
        least=25,
    ),
    Claim(
        PERFORMANCE,
        "this copy is more than half of what a call costs beyond the model",
        beyond_copies,
        least=0.5,
    ),
    Claim(
        PERFORMANCE,
        "the callbacks that stay on the host are as fast",
        lambda: [results("call_overhead").ratio("(c) x*2, 3e7", "buffer_callback", OURS)],
        most=1.1,
    ),
    Claim(
        PERFORMANCE,
        "Packages are at least four times as fast as TorchScript where autograd runs inside",
        of_packages,
        least=4,
    ),
    Claim(
        PERFORMANCE,
        "Packages take at most two thirds of ASE's time",
        lambda: of_networks("AOTInductor"),
        least=1.5,
    ),
    Claim(
        "docs/design.md",
        "take 8 to 13 times as long per search",
        lambda: of_lists("torchcall, search", ["vesin, search", "matscipy, search"]),
        least=7.5,
        most=13.5,
    ),
    Claim(
        "docs/neighbor-list.md",
        "the list costs a tenth to a fifth of what jax-md's costs",
        lambda: of_lists("torchcall, 15 steps a search", ["jax-md, 15 steps a search"]),
        least=5,
        most=11,
    ),
    Claim(
        "docs/design.md",
        "Twice the edge slots that a Lennard-Jones system needs cost nothing",
        lambda: narrowed("twice the edge slots"),
        most=1.05,
    ),
    Claim(
        "docs/design.md",
        "without narrowing more than twice the time",
        lambda: narrowed("twice the edge slots, narrow=False"),
        least=2,
    ),
    Claim(
        "docs/design.md",
        "5 times as fast for Stillinger-Weber",
        lambda: merged("Stillinger-Weber"),
        4.5,
        5.5,
    ),
    Claim(
        "docs/design.md",
        "more than twice for a message-passing network",
        lambda: merged("message"),
        2,
    ),
    Claim(
        "docs/design.md", "Lennard-Jones gains nothing", lambda: merged("Lennard-Jones"), 0.8, 1.2
    ),
    Claim(
        "docs/design.md",
        "a copy of that size takes less than a thousandth of the call",
        lambda: [
            results("output_copies").ratio(f"{model}, 4096", "memcpy of the output", OURS)
            for model in ("Lennard-Jones", "message passing")
        ],
        most=1e-3,
    ),
    Claim(
        "docs/design.md",
        "for `x * 2` on 3 million floats a fifth to a third",
        lambda: [results("output_copies").ratio("x*2, 3e+06", "memcpy of the output", OURS)],
        least=0.18,
        most=0.35,
    ),
    Claim(
        "docs/transformations.md",
        "ran 1.9 times as fast on two devices as on one, and 1.8 times as fast in two processes",
        lambda: [
            results("scaling").ratio("16 replicas of 64 atoms, TorchScript", "one device", method)
            for method in ("two devices", "two processes")
        ],
        least=1.8,
        most=1.95,
    ),
    Claim(
        "docs/transformations.md",
        "Value and gradient cost less than from a Python loop of torch",
        lambda: [results("transforms").ratio("value and gradient", OURS, "torch, Python loop")],
        most=1,
    ),
    Claim(
        "docs/transformations.md",
        "less than a third of wrap_torch2jax's",
        lambda: [results("transforms").ratio("value and gradient", OURS, "wrap_torch2jax")],
        most=1 / 3,
    ),
    Claim(
        "docs/md.md",
        "`--every 10` costs a third of the loop, and `--every 100` about a tenth",
        lambda: [
            results("md_files").ratio("argon", "torchcall md, --every 10", "loop alone") - 0.2,
            results("md_files").ratio("argon", "torchcall md, --every 100", "loop alone"),
        ],
        least=1.05,
        most=1.2,
    ),
    Claim(
        "docs/threads.md",
        "second thread made calls with 4096 atoms a fifth faster",
        lambda: second_thread("4096 atoms"),
        least=0.75,
        most=0.85,
    ),
    Claim(
        "docs/threads.md",
        "With 64 atoms, and on two devices at once, it gained nothing",
        lambda: second_thread(
            "64 atoms", "64 atoms, on two devices at once", "4096 atoms, on two devices at once"
        ),
        least=0.95,
    ),
    Claim("docs/training.md", "cost at most a tenth more than the wrapper's", parameters, most=1.1),
]
