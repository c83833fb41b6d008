"""The networks of `networks.py`: how to load each, its own ASE calculator, and a crystal."""

# pyright: reportMissingImports=false
# The networks are optional.

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.build

from torchcall import models
from torchcall._command.included import load_example
from torchcall.mliap import TorchMliap


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        title: its name in tables.
        source: what `torchcall.models.load` loads.
        calculator: makes its own ASE calculator.
        cell: makes a crystal's cubic cell of 8 atoms.
        engines: the engines that it supports.
    """

    title: str
    source: Any
    calculator: Callable[[], Any]
    cell: Callable[[], ase.Atoms]
    engines: tuple[str, ...] = ("eager", "script", "package")

    def load(self, engine: str, **options: Any) -> TorchMliap:
        """The network through one engine, in the dtype of its weights."""
        return models.load(self.source, engine=engine, **options)  # pyright: ignore


def _salt() -> ase.Atoms:
    return ase.build.bulk("NaCl", "rocksalt", a=5.69, cubic=True)


def _silicon() -> ase.Atoms:
    return ase.build.bulk("Si", cubic=True)


def sevennet() -> Network:
    """SevenNet-0, trained."""
    from sevenn.calculator import SevenNetCalculator

    return Network("7net-0", "7net-0", lambda: SevenNetCalculator("7net-0", device="cpu"), _salt)


def chgnet() -> Network:
    """CHGNet 0.3.0, trained."""
    from chgnet.model.dynamics import CHGNetCalculator

    return Network(
        "CHGNet 0.3.0",
        "chgnet-0.3.0",
        lambda: CHGNetCalculator(use_device="cpu"),
        _salt,
    )


def mace() -> Network:
    """A ScaleShiftMACE of silicon with random weights, 16x0e + 16x1o, cutoff 5 Å."""
    import torch

    model = load_example("mace_adapter").random_mace(for_compile=False, hidden="16x0e + 16x1o")
    from mace.calculators import MACECalculator

    path = Path(tempfile.mkdtemp(prefix="torchcall-")) / "silicon.model"
    torch.save(model.float(), path)
    return Network(
        "MACE 16x0e + 16x1o",
        path,
        lambda: MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32"),
        _silicon,
    )


def nequip() -> Network:
    """A NequIP of silicon with random weights: 2 layers of 16 features, l ≤ 1, cutoff 5 Å."""
    import torch

    from torchcall.models.nequip import _contained

    with _contained():  # nequip changes torch's defaults
        from nequip.integrations.ase import NequIPCalculator
        from nequip.integrations.utils import basic_transforms
        from nequip.model import NequIPGNNModel
        from nequip.utils import torch_default_dtype
        from nequip.utils.global_state import set_global_state

        class Calculator(NequIPCalculator):
            def calculate(self, *args: Any, **kwargs: Any) -> None:
                with torch_default_dtype(torch.float64):  # nequip's, of positions
                    super().calculate(*args, **kwargs)

        set_global_state()
        model = NequIPGNNModel(
            seed=0,
            model_dtype="float32",
            r_max=5.0,
            type_names=["Si"],
            num_layers=2,
            l_max=1,
            num_features=16,
            avg_num_neighbors=28.0,
        ).eval()
        about = model.metadata
        transforms = basic_transforms(about, 5.0, ["Si"], {"Si": "Si"})
    return Network(
        "NequIP, 2 layers of 16",
        model,
        lambda: Calculator(model=model, device="cpu", transforms=transforms),
        _silicon,
    )


NETWORKS: dict[str, Callable[[], Network]] = {
    "chgnet": chgnet,
    "mace": mace,
    "nequip": nequip,
    "sevennet": sevennet,
}
