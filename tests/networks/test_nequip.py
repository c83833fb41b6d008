"""NequIP and Allegro through torchcall, against nequip's own ASE calculator.

nequip has no trained models in its package: these are random ones, built and saved by nequip.
"""

import random
import warnings

import jax
import numpy as np
import pytest
import torch
from parity import (
    FLOAT32,
    FLOAT64,
    check_dynamics,
    check_second_derivatives,
    check_structures,
    evaluate,
    forces_of,
)
from structures import structures

from torchcall import models
from torchcall.models.nequip import _contained

SYSTEMS = structures("Na", "Cl", 5.6)
TYPES = ["Cl", "Na"]
NEQUIP = {
    "_target_": "nequip.model.NequIPGNNModel",
    "num_layers": 2,
    "num_features": 8,
    "radial_mlp_width": 16,
}
ALLEGRO = {
    "_target_": "allegro.model.AllegroModel",
    "num_layers": 2,
    "num_scalar_features": 8,
    "num_tensor_features": 4,
    "allegro_mlp_hidden_layers_width": 8,
    "readout_mlp_hidden_layers_width": 8,
    "radial_chemical_embed": {
        "_target_": "allegro.nn.TwoBodyBesselScalarEmbed",
        "num_bessels": 8,
        "bessel_trainable": False,
        "polynomial_cutoff_p": 6,
    },
    "per_edge_type_cutoff": {"Cl": 3.4},
}
NETWORKS = {"nequip": NEQUIP, "allegro": ALLEGRO}


def config(name, dtype="float32", types=TYPES):
    return NETWORKS[name] | {
        "seed": 0,
        "model_dtype": dtype,
        "r_max": 4.0,
        "type_names": types,
        "l_max": 1,
        "avg_num_neighbors": 20.0,
        "per_type_energy_scales": 1.3,
        "per_type_energy_shifts": dict(zip(types, (-1.0, -2.0), strict=True)),
    }


def network(name, dtype="float32", types=TYPES):
    """A random model, and its calculator."""
    pytest.importorskip(name)
    with _contained():
        from hydra.utils import get_method
        from nequip.utils.global_state import set_global_state

        set_global_state()
        options = config(name, dtype, types)
        return get_method(options.pop("_target_"))(**options).eval()


def calculator(model):
    with _contained():
        from nequip.integrations.ase import NequIPCalculator
        from nequip.integrations.utils import basic_transforms

        class Calculator(NequIPCalculator):
            def calculate(self, *args, **kwargs):
                from nequip.utils import torch_default_dtype

                with torch_default_dtype(torch.float64):  # nequip's, of positions
                    super().calculate(*args, **kwargs)

        about = model.metadata
        types = about["type_names"].split()
        transforms = basic_transforms(about, float(about["r_max"]), types, {t: t for t in types})
        return Calculator(model=model, device="cpu", transforms=transforms)


@pytest.fixture(scope="module", params=list(NETWORKS))
def pair(request):
    """A model and its calculator."""
    model = network(request.param)
    return model, calculator(model)


@pytest.mark.parametrize("engine", ["eager", "script", "package"])
def test_energies_forces_stresses_and_dynamics_are_those_of_the_calculator(pair, engine):
    model = models.load(pair[0], engine=engine)
    check_structures(model, pair[1], SYSTEMS, FLOAT32)
    check_dynamics(model, pair[1], SYSTEMS["bulk"], np.float32)
    unknown = SYSTEMS["bulk"].copy()
    unknown.numbers[3] = 14
    # In a jitted program it is an error of the call, which JAX may wrap.
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="got 14 at entry 3"):
        evaluate(model, [unknown], np.float32)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_float64_models(name):
    source = network(name, "float64")
    with jax.enable_x64(True):
        check_structures(models.load(source), calculator(source), SYSTEMS, FLOAT64)
    with pytest.raises(ValueError, match="expected None or float64"):
        models.load(source, dtype=torch.float32)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("engine", ["eager", "script"])
def test_second_derivatives(name, engine):
    source = network(name, "float64")
    with jax.enable_x64(True):
        model = models.load(source, engine=engine)
        forces = forces_of(calculator(source), SYSTEMS["bulk"])
        check_second_derivatives(model, SYSTEMS["bulk"], forces)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_float64_package_with_second_derivatives(name):
    source = network(name, "float64")
    with jax.enable_x64(True):
        model = models.load(source, engine="package", second_derivatives=True)
        expected = calculator(source)
        check_structures(model, expected, SYSTEMS, FLOAT64)
        check_second_derivatives(model, SYSTEMS["bulk"], forces_of(expected, SYSTEMS["bulk"]))


@pytest.fixture(scope="module", params=list(NETWORKS))
def checkpoint(request, tmp_path_factory):
    """A checkpoint as `nequip-train` writes it, of a model that was not trained."""
    folder = tmp_path_factory.mktemp("nequip")
    pytest.importorskip(request.param)
    with _contained():
        import ase.calculators.singlepoint
        import ase.io
        import lightning
        from nequip.train import NequIPLightningModule
        from nequip.utils import get_current_code_versions
        from nequip.utils.global_state import set_global_state

        set_global_state()
        frame = SYSTEMS["bulk"].copy()
        frame.calc = ase.calculators.singlepoint.SinglePointCalculator(
            frame, energy=0.0, forces=np.zeros((len(frame), 3))
        )
        ase.io.write(folder / "frames.xyz", [frame, frame], format="extxyz")
        transforms = [
            {
                "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                "model_type_names": TYPES,
            },
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": 4.0},
        ]
        data = {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": 0,
            "train_file_path": str(folder / "frames.xyz"),
            "val_file_path": str(folder / "frames.xyz"),
            "transforms": transforms,
        }
        module = NequIPLightningModule(
            model=config(request.param),
            num_datasets={"train": 1, "val": 1, "test": 0, "predict": 0},
            info_dict={
                "versions": get_current_code_versions(verbose=False),
                "data": data,
                "training_module": {"_target_": "nequip.train.NequIPLightningModule"},
            },
        )
        trainer = lightning.Trainer(
            logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False
        )
        trainer.strategy.connect(module)
        path = folder / f"{request.param}.ckpt"
        trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def package(checkpoint):
    """The package that `nequip-package build` makes of it."""
    path = checkpoint.with_suffix(".nequip.zip")
    with _contained():
        from nequip.scripts import package as command

        command.main(["build", str(checkpoint), str(path)])
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "package"])
def test_files_are_recognised(kind, checkpoint, package, capsys):
    path = package if kind == "package" else checkpoint
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(path)
    assert "NequIP" in capsys.readouterr().err
    expected = calculator(network(path.name.partition(".")[0]))
    check_structures(model, expected, {"bulk": SYSTEMS["bulk"]}, FLOAT32)
    with pytest.raises(ValueError, match="model_name: expected one of 'sole_model'"):
        models.load(path, model_name="other")


def test_types_with_other_names_need_a_map():
    source = network("nequip", types=["chlorine", "sodium"])
    with pytest.raises(ValueError, match="'chlorine'; pass species="):
        models.load(source)
    for wrong in (["sodium", "chlorine"], {}):
        with pytest.raises(TypeError, match="species: expected a dict of chemical symbols"):
            models.load(source, species=wrong)
    model = models.load(source, engine="eager", species={"Na": "sodium", "Cl": "chlorine"})
    assert model.species == (11, 17)
    expected = calculator(network("nequip"))
    check_structures(model, expected, {"bulk": SYSTEMS["bulk"]}, FLOAT32)


def test_compiled_models_are_refused(tmp_path):
    path = tmp_path / "model.nequip.pt2"
    path.touch()
    with pytest.raises(ValueError, match="load the file that it was compiled from"):
        models.load(path)


def test_global_settings_are_as_before(checkpoint):
    def settings():
        return torch.get_default_dtype(), torch.rand(1), np.random.rand(), random.random()

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = settings()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    models.load(checkpoint, engine="eager")
    assert settings() == expected
