"""A model refuses images on another scale than those it was trained on: as a module, exported, and served by MLflow."""

import json

import numpy as np
import pytest
import torch

from hpo.worker.packaging import package
from models import bundle, specs
from models.levels import DEFAULT, GreyValueError
from models.networks import build
from models.regressor import Regressor
from models.training import Training

SPEC = specs.CnnSpec(filters=2, kernel_size=3, dropout=0.2)
SHAPE = (1, 12, 8)


def cells(count, top=1.0):
    return np.random.default_rng(3).integers(0, 2, (count, *SHAPE)).astype(np.float32) * np.float32(top)


def model(levels):
    torch.manual_seed(0)
    return Regressor(build(SPEC, SHAPE, 2), torch.zeros(2), torch.ones(2), levels=levels).eval()


def write(folder, levels, top=1.0):
    package(
        folder,
        model(levels),
        spec=specs.to_dict(SPEC),
        image_shape=SHAPE,
        target_names=("C11", "C22"),
        unit="GPa",
        example_images=cells(2, top),
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "m", (0.0, 1.0))


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    """A model of images whose pixels are the numbers of phases, 0 and 1 of 255."""
    return write(tmp_path_factory.mktemp("model") / "m", (0.0, 1 / 255), 1 / 255)


def plain_torch(folder):
    exported = torch.export.load(next(folder.rglob("*.pt2"))).module()
    return lambda images: exported(torch.from_numpy(images)).numpy()


def plain_mlflow(folder):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder)).predict


def loaded(folder):
    module = bundle.load(folder)[0]
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


WAYS = [plain_torch, plain_mlflow, loaded]
EXPECTED = "Expected grey values from 0 to 1 as in training, found "


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bytes", "normalised", "two bytes", "not a number"])
def test_images_on_another_scale_are_refused_by_the_model_itself(folder, way, name):
    images = {
        "bytes": cells(3) * 255,
        "normalised": cells(3) * 2 - 1,
        "two bytes": cells(3) * 65535,
        "not a number": np.full((3, *SHAPE), np.nan, np.float32),
    }[name]
    numbers = {"bytes": "0 to 255", "normalised": "-1 to 1", "two bytes": "0 to 65535", "not a number": "NaN"}
    words = {"bytes": "values up to 255: divide 8-bit pixels by 255"}
    expected = numbers[name] if way is loaded else words.get(name, "values below 0, above 255 or not a number")
    with pytest.raises(GreyValueError if way is loaded else RuntimeError, match=EXPECTED + expected):
        way(folder)(images)


@pytest.mark.parametrize("way", WAYS)
def test_valid_and_resampled_images_have_the_numbers_of_a_model_without_the_check(folder, way):
    for images in (cells(3), cells(3) * 0.5 + 0.1, cells(3) * 1.3 - 0.15, cells(1)):
        expected = model(None)(torch.from_numpy(images)).detach().numpy()
        assert np.array_equal(way(folder)(images), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_dark_images_refuses_bright_ones(dark, way):
    assert np.isfinite(way(dark)(cells(2, 2 / 255))).all(), "a third phase is on the same scale"
    with pytest.raises(
        (GreyValueError, RuntimeError), match=r"grey values from 0 to 0\.0313725 as in training, found "
    ):
        way(dark)(cells(2))


def test_no_image_at_all_is_no_error(folder):
    assert loaded(folder)(cells(0)).shape == (0, 2)


def test_training_records_the_levels_that_it_saw(tmp_path):
    images, targets = cells(6) * np.float32(0.5), np.random.default_rng(0).random((6, 2))
    training = Training(
        SPEC,
        specs.TrainingSpec(epochs=1, batch_size=2),
        train=(images[:4], targets[:4]),
        validation=(images[4:], targets[4:]),
    )
    list(training.epochs())
    regressor = training.best_regressor()
    assert regressor.levels == training.last_regressor().levels == (0.0, 0.5)
    bundle.save(tmp_path, regressor, model=specs.to_dict(SPEC), image_shape=SHAPE, target_names=("a", "b"), unit="GPa")
    again, description = bundle.load(tmp_path)
    assert again.levels == description.levels == (0.0, 0.5)


def test_a_model_of_an_earlier_version_takes_the_scale_that_all_images_have(folder, tmp_path):
    spec = json.loads((folder / bundle.SPEC).read_text())
    del spec["levels"]
    (tmp_path / bundle.SPEC).write_text(json.dumps(spec))
    (tmp_path / bundle.WEIGHTS).write_bytes((folder / bundle.WEIGHTS).read_bytes())
    assert bundle.load(tmp_path)[0].levels == DEFAULT
    assert np.array_equal(loaded(tmp_path)(cells(3)), loaded(folder)(cells(3)))
    for wrong in ([0, 1], [0.5], [1.0, 0.0], [0.0, 2.0], [0.0, float("nan")], "0..1", None):
        (tmp_path / bundle.SPEC).write_text(json.dumps(spec | {"levels": wrong}))
        with pytest.raises(specs.SpecError, match='"levels": expected two numbers'):
            bundle.load(tmp_path)
