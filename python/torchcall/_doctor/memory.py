"""Memory, and the settings of JAX's and torch's allocators."""

import os
from pathlib import Path

from torchcall._doctor.report import Section

_VARIABLES = {
    "jax": (
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_ALLOCATOR",
    ),
    "torch": (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
    ),
}


def probe(section: Section) -> None:
    """Reports free memory and the variables that are set."""
    total, free = memory()
    section.values |= {"total_bytes": total, "available_bytes": free}
    if total and free:
        section.show("main memory", f"{free / 2**30:.1f} GiB available of {total / 2**30:.1f}")
    for owner, names in _VARIABLES.items():
        found = {name: os.environ.get(name) for name in names}
        section.values[owner] = found
        given = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        default = {
            "jax": "JAX's defaults: 75 % of a GPU is reserved at the start",
            "torch": "torch's defaults",
        }
        section.show(f"{'JAX' if owner == 'jax' else owner} on GPUs", given or default[owner])


def memory() -> tuple[int | None, int | None]:
    """Total and available main memory in bytes, from Linux; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {key: int(text.split()[0]) * 1024 for key, text in (s.split(":") for s in lines)}
    except (OSError, ValueError, IndexError):
        return None, None
    return sizes.get("MemTotal"), sizes.get("MemAvailable")
