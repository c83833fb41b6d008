"""GPUs as JAX and torch see them."""

import os
from pathlib import Path
from typing import Any

from torchcall._doctor.report import Section, imported, one_line

_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "JAX_CUDA_VISIBLE_DEVICES")


def probe(section: Section, *, own_process: bool) -> None:
    """Compares the GPUs of JAX and torch; reports differences.

    Args:
        section: Gets the report.
        own_process: Whether JAX may be started in a way that does not reserve a GPU's memory.
    """
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    section.values |= {
        "variables": variables,
        "driver": driver(),
        "jax": None,
        "jax_devices": None,
        "torch": None,
        "torch_cuda": None,
        "agree": None,
    }
    for name, value in variables.items():
        section.show(name, value or "(empty)")
    if imported("jax") is not None:
        _jax(section, own_process)
    if imported("torch") is not None:
        _torch(section)
    if section.values["jax"] is not None and section.values["torch"] is not None:
        _compare(section)


def _jax(section: Section, own_process: bool) -> None:
    import jax

    lent = own_process and _PREALLOCATE not in os.environ
    if lent:
        os.environ[_PREALLOCATE] = "false"
    try:
        devices = jax.devices()
    except RuntimeError as error:
        section.show("JAX", f"no devices: {one_line(error)}")
        set_here = "JAX_PLATFORMS" in os.environ
        section.problem(
            f"JAX does not start: {one_line(error)}",
            "unset JAX_PLATFORMS" if set_here else "pip install --upgrade jax jaxlib",
        )
        return
    finally:
        if lent:
            del os.environ[_PREALLOCATE]
    section.values["jax_devices"] = [str(device) for device in devices]
    section.values["jax"] = [device.device_kind for device in devices if device.platform == "gpu"]
    kinds = sorted({device.device_kind for device in devices})
    section.show("JAX", f"{', '.join(map(str, devices))} ({', '.join(kinds)})")


def _torch(section: Section) -> None:
    torch: Any = imported("torch")
    section.values["torch_cuda"] = torch.version.cuda
    found: list[str] = []
    if torch.version.cuda is None:
        text = "built without CUDA"
    elif not torch.cuda.is_available():
        text = f"built with CUDA {torch.version.cuda}, no device"
    else:
        found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        text = f"{', '.join(found)} (CUDA {torch.version.cuda})"
    section.values["torch"] = found
    section.show("torch", text)


def _compare(section: Section) -> None:
    of_jax, of_torch = section.values["jax"], section.values["torch"]
    section.values["agree"] = sorted(of_jax) == sorted(of_torch)
    if section.values["agree"]:
        if not of_jax and section.values["driver"]:
            section.note(
                "this machine has an NVIDIA driver, but JAX and torch use the CPU only",
                "pip install --upgrade 'jax[cuda13]' && pip install --force-reinstall torch",
            )
        return
    torch: Any = imported("torch")
    release = str(torch.__version__).split("+")[0]
    cuda = section.values["torch_cuda"]
    if of_jax and not of_torch and cuda is None:
        what = f"JAX has {len(of_jax)} GPU(s), torch {torch.__version__} was built without CUDA"
        remedy = f"pip install --force-reinstall torch=={release}"
    elif of_jax and not of_torch:
        what = f"JAX has {len(of_jax)} GPU(s), torch has none: {_why_not(torch)}"
        remedy = f"pip install --force-reinstall torch=={release}  # or update the driver"
    elif of_torch and not of_jax:
        what = f"torch has {len(of_torch)} GPU(s), JAX has none; programs run on the CPU"
        chosen = section.values["variables"].get("JAX_PLATFORMS")
        major = str(cuda).split(".")[0]
        remedy = "unset JAX_PLATFORMS" if chosen else f"pip install --upgrade 'jax[cuda{major}]'"
    else:
        what = f"JAX has {', '.join(of_jax)}; torch has {', '.join(of_torch)}"
        remedy = "export CUDA_VISIBLE_DEVICES=0  # and unset JAX_CUDA_VISIBLE_DEVICES"
    section.problem(what, remedy)


def _why_not(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return one_line(error)
    return "torch.cuda.is_available() is False"


def driver() -> str | None:
    """The version of NVIDIA's kernel driver, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    words = text.splitlines()[0].split() if text else []
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
