"""A model's folder: what goes in comes out, and a damaged one says what is wrong with it."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.components import COMPONENTS, SYMMETRIES
from models import bundle
from models.networks import build
from models.physics import Physics
from models.regressor import Regressor, predict
from models.specs import CnnSpec, PeriodicSpec, SpecError, to_dict

SEED = 11
SPEC = CnnSpec(filters=2, kernel_size=3, dropout=0.2)
SHAPE = (1, 12, 8)
NAMES = ("C11", "C22", "C33")


@pytest.fixture
def regressor():
    torch.manual_seed(SEED)
    return Regressor(build(SPEC, SHAPE, 3), torch.tensor([30.0, 20.0, 1e-7]), torch.tensor([5.0, 4.0, 1e-8])).eval()


@pytest.fixture
def folder(tmp_path, regressor):
    save(tmp_path / "a model", regressor)
    return tmp_path / "a model"


def save(path, regressor, **extra):
    bundle.save(
        path, regressor, model=to_dict(SPEC), image_shape=SHAPE, target_names=NAMES, unit="GPa", extra=extra or None
    )


def test_predictions_are_the_same_to_the_bit_after_saving_and_loading(regressor, tmp_path):
    save(tmp_path, regressor.to(memory_format=torch.channels_last), scores={"nmse": 0.1})
    images = np.random.default_rng(SEED).random((5, *SHAPE)).astype(np.float32)
    loaded, spec = bundle.load(tmp_path)
    assert np.array_equal(predict(loaded, images), predict(regressor.to(memory_format=torch.contiguous_format), images))
    assert (spec.target_names, spec.unit, spec.image_shape) == (NAMES, "GPa", SHAPE)
    assert spec.extra["scores"] == {"nmse": 0.1}
    assert not loaded.training


def test_the_specification_says_how_pixels_become_numbers(regressor, tmp_path):
    facts = {"model": to_dict(SPEC), "image_shape": SHAPE, "target_names": NAMES, "unit": "GPa"}
    bundle.save(tmp_path, regressor, **facts, pixels="grey values 0..1 (pixel / 65535)")
    stated = json.loads((tmp_path / "spec.json").read_text())["input"]
    assert stated == "float32, (batch, channel, height, width), grey values 0..1 (pixel / 65535)"


def test_predictions_come_out_in_the_unit_of_the_labels(regressor):
    with torch.no_grad():
        for parameter in regressor.network.parameters():
            parameter.zero_()
        regressor.network.head.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    found = predict(regressor, np.zeros((2, *SHAPE), np.float32))
    assert found == pytest.approx(np.array([[35.0, 20.0, 0.9e-7]] * 2))


def test_predictions_do_not_depend_on_the_batch(regressor):
    images = np.random.default_rng(SEED).random((7, *SHAPE)).astype(np.float32)
    assert predict(regressor, images, batch_size=2) == pytest.approx(predict(regressor, images), rel=1e-6)
    assert predict(regressor, images[:0]).shape == (0, 3)


def test_an_image_of_another_shape_is_refused_with_both_shapes(folder):
    _, spec = bundle.load(folder)
    bundle.check_shape(spec, SHAPE)
    with pytest.raises(SpecError, match=r"x.png: expected .* = \(1, 12, 8\), .*found \(1, 64, 64\)"):
        bundle.check_shape(spec, (1, 64, 64), "x.png")


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.SPEC])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SpecError, match=f"{name}: no such file"):
        bundle.load(folder)


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.SPEC])
def test_a_file_cut_short_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SpecError, match=f"{name}: not (a readable safetensors file|readable as JSON)"):
        bundle.load(folder)


class Canary:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_pickle_in_place_of_the_weights_is_refused_and_never_run(folder):
    (folder / bundle.WEIGHTS).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(SpecError, match="not a readable safetensors file"):
        bundle.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, '"format": 1, found 2'),
        ({"image_shape": [64, 64]}, '"image_shape": expected three whole numbers'),
        ({"target_names": []}, '"target_names": expected a list of names'),
        ({"model": "cnn"}, '"model": expected an object'),
        ({"model": {"family": "cnn", "filters": 2, "kernel_size": 3}}, "spec.json: .*dropout is missing"),
        ({"model": {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2}}, "tensors do not fit spec.json"),
        ({"model": {"family": "baseline"}}, "spec.json: baseline: expected images of at least 10x10"),
        ({"image_shape": [1, 12, 12]}, r"\(network.dense.weight expected"),
    ],
)
def test_a_specification_that_is_odd_or_does_not_fit_the_weights_is_refused(folder, change, message):
    spec = json.loads((folder / bundle.SPEC).read_text())
    (folder / bundle.SPEC).write_text(json.dumps(spec | change))
    with pytest.raises(SpecError, match=message):
        bundle.load(folder)


def test_a_tensor_too_few_is_named(folder):
    weights = load_file(folder / bundle.WEIGHTS)
    del weights["target_scale"]
    save_file(weights, folder / bundle.WEIGHTS)
    with pytest.raises(SpecError, match=r"target_scale expected .*found none"):
        bundle.load(folder)


def test_a_key_of_spec_json_cannot_be_overwritten(regressor, tmp_path):
    with pytest.raises(SpecError, match=r"extra: the keys unit of spec\.json are taken"):
        save(tmp_path, regressor, unit="MPa")


def test_a_periodic_model_predicts_larger_cells_and_a_repeated_cell_as_the_cell(tmp_path):
    torch.manual_seed(1)
    spec, shape = PeriodicSpec(width=3, depth=2, head=4), (1, 16, 16)
    model = Regressor(
        build(spec, shape, 9), torch.ones(9), torch.ones(9), symmetries=SYMMETRIES, image_shape=shape
    ).eval()
    bundle.save(tmp_path, model, model=to_dict(spec), image_shape=shape, target_names=COMPONENTS, unit="GPa")
    loaded, facts = bundle.load(tmp_path)
    cells = np.random.default_rng(1).integers(0, 2, (4, 1, 16, 16)).astype(np.float32)
    for times in (2, 3):
        bundle.check_shape(facts, (1, 16 * times, 16 * times))
        tiled = np.tile(cells, (1, 1, times, times))
        np.testing.assert_allclose(predict(loaded, tiled), predict(loaded, cells), rtol=0, atol=1e-5)
    for wrong in ((1, 32, 16), (2, 32, 32), (1, 6, 6), (1, 33, 33)):
        with pytest.raises(SpecError, match=r"^x\.png: .*expected"):
            bundle.check_shape(facts, wrong, where="x.png")


@pytest.fixture
def physical(tmp_path):
    """The folder of an untrained network between the bounds."""
    spec, shape = PeriodicSpec(width=2, depth=1, head=0, physics="bounded"), (1, 8, 8)
    phases = {
        "matrix": {"lame_lambda": 3.0246913580246915, "lame_mu": 1.2962962962962963},
        "inclusion": {"lame_lambda": -1.5, "lame_mu": 28.688524590163933},  # stable, though auxetic
    }
    physics = Physics("bounded", phases, COMPONENTS)
    model = Regressor(
        build(spec, shape, 9), torch.zeros(6), torch.ones(6), symmetries=SYMMETRIES, image_shape=shape, physics=physics
    )
    bundle.save(tmp_path, model, model=to_dict(spec), image_shape=shape, target_names=COMPONENTS, unit="GPa")
    return tmp_path, phases


def test_the_phases_of_a_model_come_out_of_its_folder_to_the_last_digit(physical):
    folder, phases = physical
    model, spec = bundle.load(folder)
    assert spec.phases == model.physics.phases == phases
    assert (model.physics.kind, model.physics.target_names) == ("bounded", COMPONENTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": None}, '"phases": expected an object with matrix and inclusion'),
        ({"fibre": {"lame_lambda": 1.0, "lame_mu": 1.0}}, '"phases": expected'),
        ({"matrix": {"lame_lambda": 1.0}}, "each with lame_lambda and lame_mu of a stable"),
        ({"matrix": {"lame_lambda": 1.0, "lame_mu": 1}}, "of a stable material"),
        ({"matrix": {"lame_lambda": 1.0, "lame_mu": "1.0"}}, "of a stable material"),
        ({"matrix": {"lame_lambda": float("nan"), "lame_mu": 1.0}}, "of a stable material"),
        ({"matrix": {"lame_lambda": 1e200, "lame_mu": 1.0}}, "of a stable material"),
        ({"matrix": {"lame_lambda": 1.0, "lame_mu": 0.0}}, "of a stable material"),
        ({"matrix": {"lame_lambda": -0.7, "lame_mu": 1.0}}, "of a stable material"),  # in the plane alone it would be
        ({"matrix": {"lame_lambda": 27.188, "lame_mu": 1e-3}}, "phases whose lambda . mu differ by more than 0.1%"),
    ],
)
def test_a_model_of_phases_that_cannot_be_is_refused(physical, change, message):
    folder, phases = physical
    spec = json.loads((folder / bundle.SPEC).read_text())
    spec["phases"] = {name: each for name, each in (phases | change).items() if each is not None}
    (folder / bundle.SPEC).write_text(json.dumps(spec))
    with pytest.raises(SpecError, match=f"spec.json: .*{message}"):
        bundle.load(folder)


def test_a_model_without_the_phases_it_needs_is_refused(physical):
    folder, _ = physical
    spec = json.loads((folder / bundle.SPEC).read_text())
    del spec["phases"]
    (folder / bundle.SPEC).write_text(json.dumps(spec))
    with pytest.raises(SpecError, match=r'"phases": expected an object .* found None'):
        bundle.load(folder)
