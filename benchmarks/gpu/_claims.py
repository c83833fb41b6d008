"""What must hold on a GPU, in one run."""

from _common import GpuReport

# Two measurements of the same thing differ by about so much.
NOISE = 1.02


def call_claims(report: GpuReport, case: str, n_atoms: int, us: dict[str, float]) -> None:
    """The goals that have both their methods measured in this case.

    Args:
        report: Takes the claims.
        case: Of the table.
        n_atoms: Of the case.
        us: Microseconds per call, by method.
    """
    for engine in ("TorchScript", "AOTInductor", "eager"):
        off = us.get(f"torchcall, uncaptured, {engine}")
        captured = us.get(f"torchcall, captured, {engine}")
        alone = us.get(f"torch, Python loop, {engine}")
        graph = us.get(f"torch, CUDA graph, {engine}")
        buffer = us.get(f"buffer_callback, {engine}")
        if not report.device.is_gpu:
            continue
        if off and alone:
            report.claim(case, f"{engine}, uncaptured / torch alone", off / alone, NOISE)
        if captured and graph:
            # Within 5 % or 10 µs, whichever is more.
            limit = max(1.05 * graph, graph + 10)
            report.claim(case, f"{engine}, captured, µs", captured, round(limit, 1))
        if captured and buffer and n_atoms <= 256:
            ratio = buffer / captured
            report.claim(case, f"{engine}, buffer_callback / captured", ratio, 3, at_most=False)
