"""Metadata that `torchcall.compile` writes into a package and `_engines.package_file` reads."""

from typing import Any

import torch

from torchcall._engines.package_file import FORMAT


def metadata_of(
    *,
    name: str,
    device: torch.device,
    content: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    axes: dict[str, dict[str, int | None]],
    user: dict[str, Any],
) -> dict[str, Any]:
    """The metadata.

    Args:
        name: the name of the module's class.
        device: the device that the package is compiled for.
        content: hash of operators and weights.
        inputs, outputs: a `row` for each, in the order of the package's flat lists.
        axes: an `axis` for each named axis.
        user: data of the layer above, such as `mliap`; the engine does not read it.
    """
    return {
        "format": FORMAT,
        "name": name,
        "torch": torch.__version__,
        "device": device.type,
        "inputs": inputs,
        "outputs": outputs,
        "axes": axes,
        "content": content,
        "user": user,
    }


def row(name: str, dtype: torch.dtype, shape: list[int | str], **more: Any) -> dict[str, Any]:
    """One input or output.

    Args:
        name: what errors and `rows_of` call it.
        dtype: its dtype.
        shape: per axis its size, or its name if the size varies.
        **more: for integer inputs: `rows_of`, the input whose rows the entries index; or `members`,
            the allowed entries.
    """
    return {"name": name, "dtype": dtype_name(dtype), "shape": list(shape), **more}


def axis(
    minimum: int, maximum: int | None = None, capacity: int | None = None
) -> dict[str, int | None]:
    """Sizes from `minimum` to `maximum`; the size is `capacity` if that is given."""
    return {"minimum": minimum, "maximum": maximum, "capacity": capacity}


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name: float32 for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
