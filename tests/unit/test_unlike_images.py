"""Images unlike those trained on are read as in training, or refused with one clear message."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.dataset import load
from hpo.errors import ModelError
from hpo.operations.predict import predict
from hpo.worker.packaging import package
from models import bundle, specs
from models.levels import contrast
from models.networks import build
from models.regressor import Regressor

CNN = specs.CnnSpec(filters=2, kernel_size=3, dropout=0.0)
COLOURS = np.array([[0, 0, 0], [255, 255, 255], [200, 10, 10]], np.uint8)
BITS = np.random.default_rng(1).integers(0, 2, (16, 16)).astype(np.uint8)
GREYS = np.random.default_rng(2).integers(0, 256, (16, 16)).astype(np.uint8)


def palette(indices, colours):
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([number for colour in colours for number in colour])
    return image


PICTURES = {
    "0 and 255": Image.fromarray(BITS * 255),
    "one bit": Image.fromarray(BITS * 255).convert("1"),
    "0 and 1": Image.fromarray(BITS),
    "palette": palette(BITS, [(0, 0, 0), (255, 255, 255)]),
    "alpha": Image.fromarray(np.dstack([BITS * 255] * 3 + [np.full_like(BITS, 128)])),
    "grey and alpha": Image.fromarray(BITS * 255).convert("LA"),
    "16 bits": Image.fromarray(BITS.astype(np.uint16) * 65535),
    "grey": Image.fromarray(GREYS),
    "grey, 16 bits": Image.fromarray(GREYS.astype(np.uint16) * 257),
    "labels in a palette of colours": palette(BITS, [(255, 0, 0), (0, 255, 0)]),
    "larger": Image.fromarray(np.kron(BITS, np.ones((2, 2), np.uint8)) * 255),
}
SAME = ("0 and 255", "one bit", "palette", "alpha", "grey and alpha")  # show one image


def trained_on(folder, kind):
    """Return a folder with a model, with random weights, of a data set of such images."""
    draw = np.random.default_rng(3)
    kinds = {
        "0 and 255": lambda bits: Image.fromarray(bits * 255),
        "one bit": lambda bits: Image.fromarray(bits * 255).convert("1"),
        "16 bits": lambda bits: Image.fromarray(draw.integers(1200, 60000, bits.shape).astype(np.uint16)),
        "phases": lambda bits: Image.fromarray(COLOURS[draw.integers(0, 3, bits.shape)]),
        "labels": lambda bits: Image.fromarray(draw.integers(0, 3, bits.shape).astype(np.uint8)),
    }
    (folder / "data").mkdir()
    for index in range(24):
        kinds[kind](draw.integers(0, 2, (16, 16)).astype(np.uint8)).save(folder / "data" / f"m{index}.png")
    rows = [f"m{index},{draw.normal():.3f}" for index in range(24)]
    (folder / "data" / "labels.csv").write_text("\n".join(["name,E", *rows]) + "\n")
    data = load(folder / "data")
    shape = data.images.shape[1:]
    torch.manual_seed(1)
    network = build(CNN, shape, 1)
    levels = (float(data.images.min()), float(data.images.max()))
    model = Regressor(network, torch.zeros(1), torch.ones(1), levels=levels, contrast=contrast(data.images)).eval()
    layout = data.description.layout.of_images().to_dict()
    facts = {"image_shape": shape, "target_names": ("E",), "unit": "GPa", "extra": {"data": {"layout": layout}}}
    bundle.save(folder / "model", model, model=specs.to_dict(CNN), **facts)
    return folder / "model"


def predicted(model, name):
    """Return what the model predicts for one of PICTURES, or how it refuses it."""
    file = model.parent / f"{name}.png"
    PICTURES[name].save(file)
    try:
        return predict(model, [file])["E"][0]
    except ModelError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    ("kind", "same", "refused"),
    [
        (
            "0 and 255",
            SAME,
            {
                "0 and 1": "grey values differ by 1 or more, as in training, found 0.00392. Is it on another scale",
                "16 bits": "expected pixels from 0 to 255, found 0 to 65535",
                "grey, 16 bits": "expected pixels from 0 to 255, found",
                "larger": r"expected \(channels, height, width\) = \(1, 16, 16\)",
            },
        ),
        (
            "one bit",
            ("one bit", "0 and 1"),
            {"0 and 255": "expected pixels from 0 to 1, found 0 to 255. Save it on the scale", "grey": "from 0 to 1"},
        ),
        (
            "16 bits",
            (),
            {"grey": "found 0.00.* Is it on another scale", "0 and 255": "differ by", "one bit": "differ by"},
        ),
        (
            "phases",
            SAME,  # though these are grey, and lack the third phase
            {
                "grey": r"expected one of the 3 phases' colours \(\[0, 0, 0\], .* found \[214, 214, 214\]",
                "labels in a palette of colours": r"found \[",
            },
        ),
        (
            "labels",
            ("one bit", "0 and 1"),
            {
                "grey": r"expected one of the 3 phases' colours \(0, 1, 2\), found 214 in row 0, column 0",
                "labels in a palette of colours": "expected grey pixels, as the phases have, found coloured pixels",
            },
        ),
    ],
)
def test_a_picture_of_another_form_is_read_as_in_training_or_refused(tmp_path, kind, same, refused):
    model = trained_on(tmp_path, kind)
    assert len({predicted(model, name) for name in same}) == bool(same)
    for name, message in refused.items():
        assert re.search(message, str(predicted(model, name))), (name, predicted(model, name))


@pytest.mark.parametrize(
    ("array", "outcome"),
    [
        (BITS * 255, 1),
        (BITS[..., None] * 255, 1),
        (np.stack([BITS * 255] * 4), 4),
        (np.stack([BITS * 255] * 4)[:, None], 4),
        (np.stack([BITS * 255] * 4)[..., None], 4),
        (np.stack([BITS * 255] * 4)[:, :8], r"found \(1, 8, 16\)"),
        (BITS[0], r"expected an image \(height, width\), or images \(n, height, width\), found .* shape \(16,\)"),
        (np.float32(3), r"found an array of the shape \(\)"),
        (BITS[None, None, None], r"found an array of the shape \(1, 1, 1, 16, 16\)"),
        (np.zeros((0, 16, 16)), r"found an array of the shape \(0, 16, 16\)"),
        (BITS * 1e300, "expected pixels from 0 to 255, found 0 to inf"),
        (np.where(BITS, np.nan, 0.0), "Expected grey values from 0 to 1 as in training, found NaN"),
        (BITS.astype(bool), "Is it on another scale, such as 0 and 1"),
    ],
)
def test_an_array_of_any_shape_is_one_image_or_several_or_refused(tmp_path, array, outcome):
    model = trained_on(tmp_path, "0 and 255")
    np.save(tmp_path / "x.npy", array)
    if isinstance(outcome, int):
        assert len(set(predict(model, [tmp_path / "x.npy"])["E"])) == 1
        assert len(predict(model, [tmp_path / "x.npy"])) == outcome
    else:
        with pytest.raises(ModelError, match=rf"x\.npy.*: .*{outcome}"):
            predict(model, [tmp_path / "x.npy"])


def test_of_several_images_the_one_that_is_refused_is_named(tmp_path):
    model = trained_on(tmp_path, "0 and 255")
    files = [tmp_path / f"{name}.png" for name in ("0 and 255", "palette", "0 and 1")]
    for file in files:
        PICTURES[file.stem].save(file)
    with pytest.raises(ModelError, match=r"0 and 1\.png: Expected an image whose grey values"):
        predict(model, files)


def test_a_plain_image_has_no_contrast_and_is_predicted(tmp_path):
    model = trained_on(tmp_path, "0 and 255")
    for grey in (0, 255):
        Image.new("L", (16, 16), grey).save(tmp_path / f"{grey}.png")
        assert np.isfinite(predict(model, [tmp_path / f"{grey}.png"])["E"][0])


def test_exported_models_refuse_faint_images_and_take_those_of_training(tmp_path):
    torch.manual_seed(1)
    model = Regressor(build(CNN, (1, 16, 16), 1), torch.zeros(1), torch.ones(1), levels=(0.0, 1.0), contrast=1.0).eval()
    images = np.stack([BITS[None], BITS[None] * 0]).astype(np.float32)
    facts = {"image_shape": (1, 16, 16), "target_names": ("E",), "unit": "GPa", "example_images": images}
    package(tmp_path / "model", model, spec=specs.to_dict(CNN), **facts)
    import mlflow.pyfunc  # after the exporter, which keeps its warnings quiet

    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert np.isfinite(served.predict(np.concatenate([images, images, images * 0.5]))).all()
    with pytest.raises(RuntimeError, match=r"grey values differ by 1 or more, as in training, found far less"):
        served.predict(images / 255)
    assert bundle.load(tmp_path / "model")[1].contrast == 1.0
