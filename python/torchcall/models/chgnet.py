"""CHGNet, https://github.com/CederGroupHub/chgnet: pretrained models, checkpoints and modules.

B. Deng et al., Nature Machine Intelligence 5, 1031 (2023). See docs/networks/chgnet.md.
"""

# TorchScript reads the annotations: no `from __future__ import annotations`.

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from torchcall.mliap import TorchMliap, edge_vectors
from torchcall.models import _common
from torchcall.models._chgnet_layers import (
    Angular,
    AtomConv,
    Interaction,
    Radial,
    layers_of,
    make_lists,
)

_VERSIONS = {
    "chgnet": "0.3.0",
    "chgnet-0.2.0": "0.2.0",
    "chgnet-0.3.0": "0.3.0",
    "chgnet-r2scan": "r2scan",
}
NAMES: tuple[str, ...] = tuple(_VERSIONS)
"""Pretrained models. Their weights are in the package `chgnet`."""

DISTRIBUTIONS = ("chgnet",)
"""Packages on whose version a compiled package depends."""


def recognises(source: object) -> bool:
    """Whether a source is a name, a checkpoint or a module of CHGNet."""
    if isinstance(source, str) and source.lower() in NAMES:
        return True
    if not _common.is_file(source):
        return _common.is_module_of(source, "chgnet")
    assert isinstance(source, str | Path)
    strings = _common.pickled_strings(source)
    return "model_args" in strings and "bond_graph_cutoff" in strings


@_common.one_at_a_time
def load(
    source: str | Path | torch.nn.Module,
    *,
    dtype: Any = None,
    engine: Literal["auto", "eager", "script", "package"] = "auto",
    device: Any = None,
    verbose: bool = True,
    **options: Any,
) -> TorchMliap:
    """Loads a CHGNet.

    A checkpoint is a pickle: loading it runs code that it contains, as CHGNet itself does. Load
    only files from sources that you trust.

    Args:
        source: a name in `NAMES`; a checkpoint (`.pth.tar`); or CHGNet's module in memory.
        dtype, engine, device, verbose: see `torchcall.models.load`.
        **options: options of `TorchModuleWrapper`, and `example`, see `TorchMliap.from_energy`.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError, ValueError: it is no CHGNet, or one with options that torchcall does not support.
        ImportError: chgnet is missing.
    """
    title = type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)
    with _quiet():
        module = CHGNetEnergy(_network(source))
    return _common.build(
        module,
        title=f"CHGNet: {title}",
        dtype=dtype,
        engine=engine,
        device=device,
        verbose=verbose,
        **options,
    )


class CHGNetEnergy(torch.nn.Module):
    """Energies of a CHGNet; see docs/networks/chgnet.md.

    Args:
        network: a `chgnet.model.CHGNet`. Most of its layers are shared, first layers are copied.

    Raises:
        ValueError: the network has options that no pretrained CHGNet has.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        _check_options(network)
        converter, basis = network.graph_converter, network.bond_basis_expansion
        self.cutoff = float(converter.atom_graph_cutoff)
        self.bond_cutoff = float(converter.bond_graph_cutoff)
        self.species = list(range(1, network.atom_embedding.embedding.num_embeddings + 1))
        self.embedding = network.atom_embedding.embedding
        self.edge_radial = Radial(basis.rbf_expansion_ag)
        self.bond_radial = Radial(basis.rbf_expansion_bg)
        self.angular = Angular(network.angle_basis_expansion.fourier_expansion)
        self.edge_embedding = network.bond_embedding
        self.edge_weights = network.bond_weights_ag
        self.bond_weights = network.bond_weights_bg
        self.angle_embedding = network.angle_embedding
        a, b, c = network.atom_fea_dim, network.bond_fea_dim, network.angle_embedding.out_features
        self.interactions = torch.nn.ModuleList(
            Interaction(atom_conv, bond_conv, angle_update, a, b, c)
            for atom_conv, bond_conv, angle_update in zip(
                network.atom_conv_layers[:-1],
                network.bond_conv_layers,
                # The energy does not depend on the last update.
                [*network.angle_layers[:-1], None],
                strict=True,
            )
        )
        self.last = AtomConv(network.atom_conv_layers[-1], [a, b, a])
        self.norm = network.readout_norm or torch.nn.Identity()
        self.readout = torch.nn.Sequential(*layers_of(network.mlp))
        composition = network.composition_model
        references = torch.zeros(len(self.species))
        if composition is not None:
            references = composition.fc.weight.detach()[0].clone()
        self.references = torch.nn.Parameter(references, requires_grad=False)

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        index = input["atomic_numbers"] - 1
        edge_index, batch = input["edge_index"], input["batch"]
        vectors = edge_vectors(input)
        length = vectors.square().sum(1).sqrt()
        lists = make_lists(input, length, self.bond_cutoff)

        atoms = self.embedding(index)
        radial = self.edge_radial(length)
        edges, edge_weights = self.edge_embedding(radial), self.edge_weights(radial)
        bond_length = length.index_select(0, lists.edge)
        weights = self.bond_weights(self.bond_radial(bond_length))
        direction = vectors.index_select(0, lists.edge) / bond_length.unsqueeze(1)
        cosine = direction.index_select(0, lists.first) * direction.index_select(0, lists.second)
        angles = self.angle_embedding(self.angular(cosine.sum(1)))
        for interaction in self.interactions:
            atoms, edges, angles = interaction(
                atoms, edges, angles, edge_weights, weights, edge_index, lists
            )
        atoms = self.norm(self.last(atoms, edges, edge_weights, edge_index))
        energies = self.readout(atoms).squeeze(1) + self.references.index_select(0, index)
        total = torch.zeros(input["cell"].shape[0], dtype=energies.dtype, device=energies.device)
        return total.index_add(0, batch, energies)


def _network(source: Any) -> Any:
    """The `chgnet.model.CHGNet` of a source."""
    kind = _common.require("chgnet.model", "chgnet").CHGNet
    if isinstance(source, torch.nn.Module):
        if not isinstance(source, kind):
            raise TypeError(
                "torchcall: CHGNet: expected a chgnet.model.CHGNet, got "
                f"{type(source).__module__}.{type(source).__name__}"
            )
        return source
    name = str(source).lower()
    if name in _VERSIONS and not _common.is_file(source):
        return kind.load(model_name=_VERSIONS[name], use_device="cpu", verbose=False)
    if not _common.is_file(source):
        raise FileNotFoundError(
            f"torchcall: CHGNet: expected a file or one of {', '.join(NAMES)}, got {str(source)!r}"
        )
    saved = torch.load(source, map_location="cpu", weights_only=False)
    model = saved.get("model", saved) if isinstance(saved, dict) else {}
    if not {"model_args", "state_dict"} <= set(model):
        raise ValueError(
            f"torchcall: CHGNet: {source}: expected a checkpoint of CHGNet, which has 'model_args' "
            "and 'state_dict', got another file"
        )
    weights = model["state_dict"]
    # The arguments saved with version 0.2.0 lack this one.
    bias = any(".mlp_out." in name and name.endswith(".bias") for name in weights)
    network = kind(**{**model["model_args"], "mlp_out_bias": bias})
    network.load_state_dict(weights)
    return network


def _check_options(network: Any) -> None:
    """Refuses options that no pretrained CHGNet has.

    Raises:
        ValueError: an option is not supported; the message names it.
    """
    arguments, reference = network.model_args, network.composition_model
    power = arguments.get("cutoff_coeff", 0)
    for name, supported in {
        "mlp_first": network.mlp_first,
        "final_mlp": hasattr(network.mlp, "layers"),
        "update_bond": isinstance(network.bond_conv_layers, torch.nn.ModuleList),
        "update_angle": isinstance(network.angle_layers, torch.nn.ModuleList),
        "conv_norm": arguments.get("conv_norm") is None,
        "cutoff_coeff": power == int(power) and power > 0,
        "composition_model": reference is None
        or (hasattr(reference, "fc") and reference.is_intensive == network.is_intensive),
    }.items():
        if not supported:
            raise ValueError(
                f"torchcall: CHGNet: {name}: expected the value of the pretrained models, got "
                f"{arguments.get(name)!r}, which torchcall does not support"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of CHGNet and pymatgen, and what CHGNet prints when it is made."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
