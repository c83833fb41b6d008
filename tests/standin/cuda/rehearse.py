"""Runs a program as if the machine had two GPUs, with torch's CUDA build and JAX's CUDA plugin.

    python tests/standin/cuda/rehearse.py python -m pytest tests/gpu
    make gpu-rehearsal PYTHON=...

Everything above CUDA is real: torch's allocator, streams, captures and autograd, XLA's compiler and
runtime. Below it, memory is a file that the host cannot touch at the addresses that it is told,
streams are worked through later and in turns by one thread, and a capture is voided by what CUDA
forbids. XLA's kernels are interpreted from PTX; operators of torch are computed on the CPU. So
results are right or wrong as they would be on a card, but for races inside kernels, rounding, and
everything that has to do with time. cuBLAS, cuDNN and the profiler do not work.

Needs torch and jax for CUDA 13, nvidia-cuda-crt and nvidia-cuda-cccl in the Python that runs this,
and a C++ compiler.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import build

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ROOT / "build" / f"cuda-standin-{version('torch')}"
XLA_FLAGS = (
    f"--xla_gpu_cuda_data_dir={build.HERE}",
    "--xla_gpu_enable_libnvptxcompiler=false",
    "--xla_gpu_enable_libnvjitlink=false",
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_command_buffer=",
    # What is machine code has no effect: CUB's sorts and cuBLAS.
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_cub_radix_sort=false",
    "--xla_disable_hlo_passes=cublas-gemm-rewriter",
)


def environment() -> dict[str, str]:
    """That of the program: what it loads first, and what frameworks must not ask."""
    libraries = [str(LIBRARIES / n) for n in (build.DRIVER, build.RUNTIME, build.MANAGEMENT)]
    old = os.environ
    return {
        "LD_PRELOAD": ":".join(libraries),
        "PATH": os.pathsep.join([str(build.HERE / "bin"), old.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(build.HERE / "site"), old.get("PYTHONPATH")])
        ),
        "TRITON_LIBCUDA_PATH": str(LIBRARIES),
        "TRITON_PTXAS_PATH": str(build.HERE / "bin" / "ptxas"),
        "CPATH": os.pathsep.join(filter(None, [*build.headers(), old.get("CPATH")])),
        "LIBRARY_PATH": os.pathsep.join(filter(None, [str(LIBRARIES), old.get("LIBRARY_PATH")])),
        "TORCHCALL_STANDIN_OPERATORS": str(LIBRARIES / build.OPERATORS),
        "XLA_FLAGS": " ".join([*XLA_FLAGS, old.get("XLA_FLAGS", "")]).strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": old.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
        # Several threads compute on the CPU, and their helpers would wait for each other.
        "OMP_NUM_THREADS": old.get("OMP_NUM_THREADS", "1"),
        "JAX_PLATFORMS": "cuda,cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": old.get("TF_CPP_MIN_LOG_LEVEL", "3"),
    }


def main() -> None:
    """Builds, and becomes the program."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    build.build(LIBRARIES)
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | environment())


if __name__ == "__main__":
    main()
