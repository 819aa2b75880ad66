"""What hpo.worker.packaging writes: the same numbers by plain MLflow, by plain PyTorch and by hpo."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.components import COMPONENTS
from hpo.errors import ModelError
from hpo.operations.predict import predict
from hpo.tracking import experiments, logged_models, registry
from hpo.tracking.client import Tracker
from hpo.tracking.foreign import PT2
from hpo.worker.packaging import package
from models.networks import build
from models.regressor import Regressor
from models.regressor import predict as reference
from models.specs import from_dict

LARGEST = {"family": "cnn", "filters": 32, "kernel_size": 5, "dropout": 0.2}  # config 22, 1.1 million parameters
SHAPE = (1, 64, 64)
CLOSE = 2e-6  # of the largest prediction: the kernels for other strides or batch sizes round differently


def regressor(seed: int = 0) -> Regressor:
    """Config 22 as it comes out of training: channels-last, and targets in GPa."""
    torch.manual_seed(seed)
    network = build(from_dict(LARGEST), SHAPE, len(COMPONENTS)).to(memory_format=torch.channels_last)
    return Regressor(network, torch.linspace(5, 30, len(COMPONENTS)), torch.linspace(1, 10, len(COMPONENTS))).eval()


def cells(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (count, *SHAPE)).astype(np.float32)


def write(folder: Path, model: Regressor) -> Path:
    package(
        folder,
        model,
        spec=LARGEST,
        image_shape=SHAPE,
        target_names=COMPONENTS,
        unit="GPa",
        example_images=cells(2),
        extra={"digest": "abc"},
    )
    return folder


@pytest.fixture(scope="module")
def model() -> Regressor:
    return regressor()


@pytest.fixture(scope="module")
def folder(model: Regressor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packaged") / "model", model)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 2, 100])
def test_plain_mlflow_gives_the_regressors_numbers_for_any_batch_size(
    folder: Path, model: Regressor, count: int
) -> None:
    import mlflow.pyfunc

    images = cells(100)[-count:]
    assert_close(mlflow.pyfunc.load_model(str(folder)).predict(images), reference(model, images))


def test_plain_pytorch_gives_the_regressors_numbers(folder: Path, model: Regressor) -> None:
    images = cells(3)
    exported = torch.export.load(folder / PT2).module()
    assert_close(exported(torch.from_numpy(images)).detach().numpy(), reference(model, images))


def test_packaging_leaves_the_regressor_and_the_random_state_alone(tmp_path: Path) -> None:
    model, torch_state = regressor(), torch.get_rng_state()
    weight = model.network.get_parameter(next(name for name, _ in model.network.named_parameters()))
    stride = weight.stride()
    write(tmp_path / "model", model)
    assert weight.requires_grad
    assert weight.stride() == stride
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_single_example_image_is_refused(model: Regressor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \(2 or more, 1, 64, 64\), found \(1, 1, 64, 64\)"):
        package(
            tmp_path / "m",
            model,
            spec=LARGEST,
            image_shape=SHAPE,
            target_names=COMPONENTS,
            unit="GPa",
            example_images=cells(1),
        )


def test_requirements_name_versions_that_a_package_index_knows(folder: Path) -> None:
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert {line.split("==")[0] for line in lines} == {"mlflow", "torch", "numpy"}
    assert all(re.fullmatch(r"\w+==[\d.]+", line) for line in lines), lines


def test_both_pieces_of_the_readme_run_as_they_stand(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    imports = [set(re.findall(r"\b(torch|mlflow|hpo|models)\b", block.split("model =")[0])) for block in blocks]
    assert imports == [{"torch"}, {"mlflow"}]
    for block in blocks:
        assert len(block.splitlines()) <= 5
        program = f"{block}\nassert tuple(predictions.shape) == (3, {len(COMPONENTS)})"
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_champion_gives_the_same_numbers_from_the_registry_as_from_hpo_predict(
    tracking_uri: str, folder: Path, model: Regressor, tmp_path: Path
) -> None:
    tracker = Tracker(tracking_uri)
    name = f"champions-{tmp_path.name}"
    experiment = experiments.ensure(tracker, f"study-{tmp_path.name}", description="", params=(), owner="here")
    run = tracker.ensure_run(experiment, key="0", name="0", kind="trial", params={}, tags={}, start_ms=1)
    logged = logged_models.log(tracker, run, experiment, folder, name="cnn", key="0")
    registry.ensure_registered_model(tracker, name, description="", tags={}, owner="here")
    version = registry.register(
        tracker, model_name=name, owner="here", key="0", model_id=logged.model_id, run_id=run, description="", tags={}
    )
    registry.set_alias(tracker, name, "champion", version)

    images = cells(5)
    np.save(tmp_path / "images.npy", images)
    program = (
        f"import mlflow, numpy as np; mlflow.set_tracking_uri({tracking_uri!r})\n"
        f"model = mlflow.pyfunc.load_model('models:/{name}@champion')\n"
        f"np.save('predictions.npy', model.predict(np.load('images.npy')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    by_mlflow = np.load(tmp_path / "predictions.npy")

    download = registry.download(
        tracker, model_name=name, version="champion", folder=tmp_path / "model", expected_sha256=logged.sha256
    )
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray((image[0] * 255).astype(np.uint8)).save(path)
    frame = predict(download, paths)
    assert list(frame.columns) == ["image", *COMPONENTS]
    assert frame.attrs["unit"] == "GPa"
    assert_close(frame[list(COMPONENTS)].to_numpy(), by_mlflow)
    assert_close(by_mlflow, reference(model, images))


def test_predict_explains_a_bad_image_or_folder(folder: Path, tmp_path: Path) -> None:
    small, broken, deep = (tmp_path / name for name in ("small.png", "broken.png", "deep.png"))
    Image.new("L", (32, 64)).save(small)
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("I;16", (64, 64)).save(deep)
    cases = {
        small: r"small\.png: expected .* = \(1, 64, 64\), as the model was trained, found \(1, 64, 32\)",
        broken: r"broken\.png: cannot be read as an image",
        deep: "expected 8 bits a channel, found mode I",
        tmp_path / "none.png": "No such file",
    }
    for path, message in cases.items():
        with pytest.raises(ModelError, match=message):
            predict(folder, [path])
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        predict(tmp_path, [])


def test_predict_reads_colour_and_one_bit_images_as_grey(folder: Path, tmp_path: Path) -> None:
    image = Image.fromarray((cells(1)[0, 0] * 255).astype(np.uint8))
    paths = [tmp_path / f"{mode}.png" for mode in ("L", "RGB", "RGBA", "1")]
    for path in paths:
        image.convert(path.stem).save(path)
    rows = predict(folder, paths)[list(COMPONENTS)].to_numpy()
    assert np.ptp(rows, axis=0).max() == 0
    assert predict(folder, []).shape == (0, 1 + len(COMPONENTS))
