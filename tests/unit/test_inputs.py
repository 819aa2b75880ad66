"""Scalar inputs beside the images: from a table to the network's features, and to further images' predictions."""

import hashlib
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import records
import torch
from PIL import Image
from safetensors.torch import load_file

from data_pipeline.dataset import check, load
from data_pipeline.npz import load_npz, save_npz
from hpo.errors import ModelError
from hpo.operations.predict import predict as predict_files
from hpo.recording.tasks import squared_errors
from hpo.tracking.foreign import PT2
from hpo.worker import probing, protocol, scoring, train_trial
from hpo.worker.packaging import package
from models import bundle, metrics, sizes, specs
from models.networks import build, parameter_count
from models.regressor import Regressor, predict
from models.scalars import InputError
from models.training import Training

COUNT = 60
NAMES = ("R", "T")
CNN = specs.CnnSpec(filters=2, kernel_size=3, dropout=0.0)
PERIODIC = specs.PeriodicSpec(width=4, depth=1, head=8)
FAMILIES = [
    (specs.BaselineSpec(), 16),
    (CNN, 16),
    (PERIODIC, 16),
    (specs.PeriodicSpec(width=4, depth=1, head=0, volume_fraction=False), 16),
    (specs.TransferSpec(backbone="resnet50", weights="none"), 32),
]


@pytest.fixture
def folder(tmp_path):
    """Noise without meaning; the target is a straight line in R, whose unit stands in the header."""
    draw = np.random.default_rng(5)
    (tmp_path / "images").mkdir()
    lines = ["name,R [mm],T,E [GPa]"]
    for index in range(COUNT):
        image = draw.integers(0, 2, (16, 16)).astype(np.uint8) * 255
        Image.fromarray(image).save(tmp_path / "images" / f"cell_{index:02d}.png")
        radius, temperature = draw.uniform(-1, 1), draw.uniform(300, 900)
        lines.append(f"cell_{index:02d}.png,{radius:.6f},{temperature:.2f},{20 + 3 * radius:.6f}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dataset.toml").write_text('inputs = ["R", "T"]\n')
    return tmp_path


def edit(folder, old, new, file="labels.csv"):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def trained(folder, spec=CNN, epochs=40, **training):
    data = load(folder)
    run = Training(
        spec,
        specs.TrainingSpec(epochs=epochs, batch_size=8, learning_rate=3e-3, **training),
        train=data.part(data.split.train),
        validation=data.part(data.split.validation),
        input_names=data.input_names,
        symmetries={"flip_horizontal": (0,), "flip_vertical": (0,), "transpose": (0,)},
    )
    list(run.epochs())
    return data, run


# From the table


def test_stated_inputs_are_read_with_their_units_and_are_no_targets(folder):
    data = load(folder)
    assert (data.input_names, data.target_names) == (NAMES, ("E",))
    assert (data.input_units, data.units) == ({"R": "mm"}, {"E": "GPa"})
    assert data.targets[:, 0] == pytest.approx(20 + 3 * data.inputs[:, 0], abs=1e-5)
    assert [part.shape for part in data.part(data.split.test)] == [(9, 1, 16, 16), (9, 1), (9, 2)]


def test_the_digest_covers_names_and_numbers_of_inputs(folder):
    digests = [load(folder).digest]
    edit(folder, '["R", "T"]', '["R"]', "dataset.toml")
    edit(folder, "R [mm],T,E", "R [mm],note,E")  # so that T is a target in neither
    (folder / "labels.csv").write_text(
        re.sub(r"(cell_\d+\.png,[^,]+),[^,]+", r"\1,new", (folder / "labels.csv").read_text())
    )
    digests.append(load(folder).digest)
    first = (folder / "labels.csv").read_text().splitlines()[1].split(",")[1]
    edit(folder, first, "0.123")
    digests.append(load(folder).digest)
    assert len(set(digests)) == 3


def test_a_data_set_without_inputs_keeps_its_digest(folder):
    (folder / "dataset.toml").write_text('targets = ["E"]\n')
    data = load(folder)
    facts = {"shape": data.images.shape, "targets": ("E",), "unit": "GPa"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update((data.images * 255).astype(np.uint8).tobytes())
    digest.update(data.targets.astype("<f8").tobytes())
    assert data.digest == digest.hexdigest() and data.inputs is None


def test_inputs_travel_in_the_file_of_the_data_set(folder, tmp_path):
    data = load(folder)
    save_npz(data, tmp_path / "data.npz")
    arrived = load_npz(tmp_path / "data.npz")
    assert arrived.digest == data.digest and arrived.input_units == data.input_units
    assert np.array_equal(arrived.inputs, data.inputs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "cell_03.png,",
            "cell_03.png,,9\n#",
            "labels.csv line 5.*: R \\[mm\\]: expected a number, because it is an input",
        ),
        ("cell_03.png,", "cell_03.png,warm,9,9\n#", "line 5: R \\[mm\\]: expected a number, found 'warm'"),
    ],
)
def test_a_missing_input_is_refused_with_its_row(folder, old, new, message):
    text = (folder / "labels.csv").read_text().replace(old, new)
    (folder / "labels.csv").write_text("".join(line for line in text.splitlines(True) if not line.startswith("#")))
    assert any(re.search(message, problem) for problem in check(folder)), check(folder)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('inputs = ["r"]', "no column is called r. There are: name, R"),
        ('inputs = ["R", "R"]', "inputs: expected a list of columns, each once"),
        ('inputs = ["R"]\ntargets = ["R", "E"]', "targets: expected different names, none of them an input"),
        ('inputs = ["R"]\n[symmetry]\ntranspose = {E = "R"}', "transpose: R is an input"),
    ],
)
def test_inputs_that_cannot_be_are_refused(folder, toml, message):
    (folder / "dataset.toml").write_text(f"{toml}\n")
    assert any(message in problem for problem in check(folder)), check(folder)


def test_the_description_that_is_written_gives_the_same_data(folder):
    edit(folder, "E [GPa]", "E")
    (folder / "dataset.toml").write_text('inputs = ["R", "T"]\nunit = "MPa"\n')
    data = load(folder)
    (folder / "dataset.toml").write_text(data.description.to_toml())
    again = load(folder)
    assert (again.digest, again.units, again.input_units) == (data.digest, {"E": "MPa"}, {"R": "mm"})


def test_an_image_with_several_rows_is_refused_with_the_way_out(folder):
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(f"{text}cell_03.png,0.5,400,21\n")
    assert any(
        re.search("1 name that .* cell_03. Give each row a copy .* and name a group", line) for line in check(folder)
    )


def test_an_input_that_does_not_vary_is_refused(folder):
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(re.sub(r"(png,[^,]+),[^,]+", r"\1,300", text))
    assert any("inputs: T is 300 in every row" in problem for problem in check(folder))


# In the networks


@pytest.mark.parametrize(("spec", "side"), FAMILIES)
def test_inputs_add_columns_to_one_layer_and_nothing_without_them(spec, side):
    shape = (1, side, side)

    def network(*inputs):
        torch.manual_seed(1)
        return build(spec, shape, 3, *inputs)

    plain, same, wider = network(), network(0), network(2)
    assert (
        plain.state_dict().keys()
        == same.state_dict().keys()
        == wider.state_dict().keys()
        - {
            "scalars.mean",
            "scalars.scale",
        }
    )
    assert all(torch.equal(values, same.state_dict()[name]) for name, values in plain.state_dict().items())
    different = [name for name, values in plain.state_dict().items() if values.shape != wider.state_dict()[name].shape]
    assert len(different) == 1
    assert parameter_count(wider) == sizes.size(spec, shape, 3, 2).parameters > sizes.size(spec, shape, 3).parameters


def test_the_first_weights_without_inputs_are_those_of_earlier_versions():
    torch.manual_seed(1)
    network = build(CNN, (1, 16, 16), 3)
    digest = hashlib.sha256(b"".join(values.numpy().tobytes() for values in network.state_dict().values()))
    assert digest.hexdigest()[:16] == "a8b12bdc2d210c1e"


@pytest.mark.parametrize(
    ("spec", "training"),
    [(CNN, {}), (PERIODIC, {"augmentation": "symmetry", "ema": 0.9})],
    ids=["cnn", "symmetric, augmented, averaged"],
)
def test_a_network_learns_a_target_that_depends_on_the_scalar_alone(folder, spec, training):
    data, run = trained(folder, spec, epochs=60, **training)
    assert run.best_nmse < 0.05
    without = Training(
        spec,
        specs.TrainingSpec(epochs=20, batch_size=8, learning_rate=3e-3),
        train=data.part(data.split.train)[:2],
        validation=data.part(data.split.validation)[:2],
        symmetries={"flip_horizontal": (0,)},
    )
    list(without.epochs())
    assert without.best_nmse > 0.5


def test_a_frozen_backbone_learns_from_the_scalar_beside_its_stored_features(folder, tmp_path):
    data = load(folder, image_size=32)
    spec = specs.TransferSpec(backbone="vgg16", weights="none")

    def train(cache):
        run = Training(
            spec,
            specs.TrainingSpec(epochs=60, batch_size=8, learning_rate=1e-2),
            train=data.part(data.split.train),
            validation=data.part(data.split.validation),
            input_names=data.input_names,
            cache=cache,
        )
        list(run.epochs())
        return run

    first, again = train(tmp_path / "features"), train(tmp_path / "features")
    assert first.best_nmse == again.best_nmse < 0.1
    images, _, inputs = data.part(data.split.validation)
    found = predict(first.best_regressor(), images, inputs)
    assert ((found - data.targets[data.split.validation]) ** 2).mean() == pytest.approx(first.best_mse, rel=1e-3)


def test_a_training_with_inputs_goes_on_to_the_bit(folder):
    data = load(folder)

    def training(epochs, state=None):
        return Training(
            CNN,
            specs.TrainingSpec(epochs=epochs, batch_size=8, schedule="constant"),
            train=data.part(data.split.train),
            validation=data.part(data.split.validation),
            input_names=data.input_names,
            state=state,
        )

    whole = training(4)
    epochs = list(whole.epochs())
    stopped = training(4)
    for epoch in stopped.epochs():
        if epoch.number == 2:
            break
    resumed = training(4, stopped.state())
    assert [epoch.metrics["val/mse"] for epoch in resumed.epochs()] == [
        epoch.metrics["val/mse"] for epoch in epochs[2:]
    ]


def test_a_second_phase_starts_from_a_network_with_inputs(folder):
    data, first = trained(folder, epochs=30)
    second = Training(
        CNN,
        specs.TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-9),
        train=data.part(data.split.train),
        validation=data.part(data.split.validation),
        input_names=data.input_names,
        initial=first.best_regressor().network.state_dict(),
    )
    list(second.epochs())
    assert second.best_nmse == pytest.approx(first.best_nmse, rel=1e-3)


def test_the_baseline_predictor_is_linear_in_the_inputs(folder):
    data = load(folder)
    images, targets, inputs = data.part(data.split.validation)
    predictor = metrics.volume_fraction_predictor(*data.part(data.split.train))
    assert predictor(images, inputs) == pytest.approx(targets, abs=1e-4)


def test_inputs_that_do_not_fit_the_images_are_refused(folder):
    data = load(folder)
    train, validation = data.part(data.split.train), data.part(data.split.validation)
    spec = specs.TrainingSpec(epochs=1)
    with pytest.raises(specs.SpecError, match="validation split: expected inputs of 9 images"):
        Training(CNN, spec, train=train, validation=validation[:2], input_names=NAMES)
    with pytest.raises(specs.SpecError, match="inputs: expected a column for each of R"):
        Training(CNN, spec, train=train, validation=validation, input_names=("R",))
    broken = (train[0], train[1], np.full_like(train[2], np.nan))
    with pytest.raises(specs.SpecError, match="training split: expected finite inputs"):
        Training(CNN, spec, train=broken, validation=validation, input_names=NAMES)


@pytest.mark.usefixtures("one_thread")
def test_a_trainer_process_proves_trains_and_scores_with_inputs(folder, tmp_path):
    data, file = load(folder), tmp_path / "set.npz"
    save_npz(data, file)
    model, settings = specs.to_dict(CNN), {"epochs": 30, "batch_size": 8, "learning_rate": 3e-3}
    spec = records.spec(model=model, training=settings, seed=1)
    where = {"spec": spec, "data": file, "device": "cpu"}
    stop = threading.Event()
    proved = probing.prove(protocol.Prove(folder=tmp_path / "proof", **where), lambda message: None, stop)
    assert proved == protocol.Proved(device="")
    paths = {"checkpoint": None, "start": None, "folder": tmp_path / "trial", "cache": tmp_path / "cache"}
    request = protocol.Train(checkpoint_interval=60.0, **paths, **where)
    trained = train_trial.train(request, lambda message: None, stop)
    score = protocol.Score(folder=trained.folder, data=file, predictions=tmp_path / "p.csv", errors=tmp_path / "e.npz")
    scored = scoring.score(score, lambda message: None, stop)
    assert scored.model.validation.r2 == pytest.approx(trained.validation.r2)
    assert scored.model.test.r2 > 0.7
    with np.load(tmp_path / "e.npz") as errors:
        assert errors["network"] == pytest.approx(squared_errors(trained.predictions), rel=1e-4, abs=1e-9)
        assert scored.predictors.keys() == {"mean", "volume fraction", "descriptors"}
        for name, scores in [("network", scored.model), *scored.predictors.items()]:
            nmse = (errors[name].mean(axis=0) / errors["variance of the training labels"]).mean()
            assert nmse == pytest.approx(scores.validation.nmse, rel=1e-9), "each image's share of the recorded score"
    assert scored.predictors["volume fraction"].test.r2 == pytest.approx(1.0)  # the target is linear in R

    files = [folder / name for name in data.names[:3]]
    frame = predict_files(trained.folder, files, folder / "labels.csv")
    expected = predict(bundle.load(trained.folder)[0], data.images[:3], data.inputs[:3])
    assert frame["E"].to_numpy() == pytest.approx(expected[:, 0], rel=1e-5)


# The model's folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A packaged model of three inputs' worth of ranges, one of which has a name in words."""
    torch.manual_seed(2)
    regressor = Regressor(
        build(CNN, (1, 16, 16), 2, 2),
        torch.tensor([10.0, 20.0]),
        torch.ones(2),
        levels=(0.0, 1.0),
        input_names=("R", "test temperature"),
        ranges=((-1.0, 0.5), (300.0, 900.0)),
    ).eval()
    regressor.network.scalars.learn(torch.tensor([[-1.0, 300.0], [0.5, 900.0]]))
    folder = tmp_path_factory.mktemp("packaged") / "model"
    package(
        folder,
        regressor,
        spec=specs.to_dict(CNN),
        image_shape=(1, 16, 16),
        target_names=("a", "b"),
        unit="GPa",
        example_images=images(2),
        example_inputs=inputs(2),
        extra={"data": {"layout": {"levels": "grey", "axes": "nhw", "range": [0, 255], "units": {"R": "mm"}}}},
    )
    return folder, regressor


def images(count):
    return np.random.default_rng(0).integers(0, 2, (count, 1, 16, 16)).astype(np.float32)


def inputs(count):
    return np.random.default_rng(1).uniform([-1, 300], [0.5, 900], (count, 2)).astype(np.float32)


def test_the_stored_the_exported_and_the_served_model_are_the_trained_one(model):
    import mlflow.pyfunc

    folder, regressor = model
    expected = predict(regressor, images(5), inputs(5))
    assert np.array_equal(predict(bundle.load(folder)[0], images(5), inputs(5)), expected)
    exported = torch.export.load(folder / PT2).module()
    by_torch = exported(torch.from_numpy(images(5)), torch.from_numpy(inputs(5))).numpy()
    served = mlflow.pyfunc.load_model(str(folder))
    assert served.metadata.signature.inputs.input_names() == ["images", "R", "test temperature"]
    columns = dict(zip(("R", "test temperature"), inputs(5).T, strict=True))
    by_mlflow = served.predict({"images": images(5)} | columns)
    for found in (by_torch, by_mlflow):
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert (predict(regressor, images(5), inputs(10)[5:]) != expected).all()


def test_exported_models_refuse_missing_and_far_inputs(model):
    import mlflow.pyfunc

    served = mlflow.pyfunc.load_model(str(model[0]))
    radius, temperature = inputs(2).T
    with pytest.raises(Exception, match="missing inputs"):
        served.predict({"images": images(2), "R": radius})
    for wrong in (temperature + 2000, temperature * np.float32("nan")):
        with pytest.raises(RuntimeError, match="Expected test temperature from 300 to 900 as in training"):
            served.predict({"images": images(2), "R": radius, "test temperature": wrong})


def test_the_loaded_model_refuses_missing_far_and_too_many_inputs(model):
    regressor, _ = bundle.load(model[0])
    for wrong, message in (
        (None, r"inputs R, test temperature of the shape \(2, 2\), found None"),
        (inputs(2)[:, :1], r"found \(2, 1\)"),
        (inputs(3), r"found \(3, 2\)"),
        (inputs(2) + np.float32([0, 2000]), "Expected test temperature from 300 to 900 .* Is it in another unit"),
        (inputs(2) * np.float32("nan"), "Expected R from -1 to 0.5 as in training, found nan"),
    ):
        with pytest.raises(InputError, match=message):
            regressor(torch.from_numpy(images(2)), None if wrong is None else torch.from_numpy(wrong))
    plain = Regressor(build(CNN, (1, 16, 16), 2), torch.zeros(2), torch.ones(2)).eval()
    with pytest.raises(InputError, match="expected inputs none"):
        plain(torch.from_numpy(images(2)), torch.from_numpy(inputs(2)))


@pytest.mark.parametrize(
    "value", [[], {"R": [0, 1]}, {"R": [1.0, 0.0]}, {"R": [0.0, 1e300]}, {"": [0.0, 1.0]}, {"R": [0.0]}, {"R": None}]
)
def test_odd_inputs_in_spec_json_are_refused(model, tmp_path, value):
    for name in (bundle.SPEC, bundle.WEIGHTS):
        (tmp_path / name).write_bytes((model[0] / name).read_bytes())
    spec = json.loads((tmp_path / bundle.SPEC).read_text())
    (tmp_path / bundle.SPEC).write_text(json.dumps(spec | {"inputs": value}))
    with pytest.raises(specs.SpecError, match='"inputs": expected an object of names'):
        bundle.load(tmp_path)


@pytest.mark.slow
def test_both_pieces_of_a_readme_with_inputs_run_as_they_stand(model):
    text = (model[0] / "README.md").read_text()
    assert "R (-1 to 0.5 in training)" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        program = f"{block}\nassert tuple(predictions.shape) == (3, 2)"
        done = subprocess.run([sys.executable, "-B", "-c", program], cwd=model[0], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# Further images


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"new_{number}.png" for number in range(4)]
    for path, image in zip(paths, images(4), strict=True):
        Image.fromarray((image[0] * 255).astype(np.uint8)).save(path)
    return paths


def table(folder, *lines):
    (folder / "new.csv").write_text("\n".join(lines) + "\n")
    return folder / "new.csv"


def test_predict_takes_inputs_by_the_images_names_in_any_order(model, pictures):
    rows = [f"other/NEW_{number};{r:.7f};{t:.4f}".replace(".", ",") for number, (r, t) in enumerate(inputs(4).tolist())]
    file = table(pictures[0].parent, "image;R [mm];test temperature", *rows[::-1], "unused;1;1")
    frame = predict_files(model[0], pictures, file)
    expected = predict(model[1], images(4), inputs(4))
    assert frame[["a", "b"]].to_numpy() == pytest.approx(expected, rel=1e-4)
    one = predict_files(model[0], pictures[2:3], file)
    assert one[["a", "b"]].to_numpy() == pytest.approx(expected[2:3], rel=1e-4)


def test_predict_takes_inputs_row_by_row_for_an_array_of_images(model, tmp_path):
    np.savez(tmp_path / "new.npz", x=images(4)[:, 0] * 255, y=inputs(4))
    file = table(tmp_path, "R,test temperature", *(f"{r},{t}" for r, t in inputs(4).tolist()))
    frame = predict_files(model[0], [f"{tmp_path}/new.npz:x"], file)
    assert frame[["a", "b"]].to_numpy() == pytest.approx(predict(model[1], images(4), inputs(4)), rel=1e-4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["name,R", "new_0,0"],
            "expected the columns R, test temperature, found no test temperature. There are: name, R",
        ),
        (["name,R,test temperature", "new_1,0,500"], "no row for .*new_0.png"),
        (["name,R,test temperature", "new_0,0,500", "new_0,1,500"], "expected one row for .*new_0.png, found several"),
        (["name,R,test temperature", "new_0,,500", "new_1,0,500"], "line 2: R: expected a number, found ''"),
        (["name,R,test temperature", "new_0,hot,500"], "line 2: R: expected a number, found 'hot'"),
        (["name,R [m],test temperature", "new_0,0,500"], "R: expected the unit mm as in training, found m"),
        (["name,R,test temperature", "new_0,0,5000"], "Expected test temperature from 300 to 900 .* found 5000"),
    ],
)
def test_predict_names_what_is_wrong_with_the_inputs(model, pictures, lines, message):
    with pytest.raises(ModelError, match=rf"(new\.csv|new_0\.png): .*{message}"):
        predict_files(model[0], pictures[:1], table(pictures[0].parent, *lines))


def test_predict_asks_for_inputs_and_refuses_those_that_a_model_does_not_take(model, pictures, tmp_path):
    with pytest.raises(ModelError, match=r"takes R, test temperature beside each image: .* \(--inputs FILE\)"):
        predict_files(model[0], pictures)
    plain = Regressor(build(CNN, (1, 16, 16), 1), torch.zeros(1), torch.ones(1))
    bundle.save(
        tmp_path / "plain", plain, model=specs.to_dict(CNN), image_shape=(1, 16, 16), target_names=("a",), unit="GPa"
    )
    with pytest.raises(ModelError, match="this model takes images alone"):
        predict_files(tmp_path / "plain", pictures, table(tmp_path, "name,R", "new_0,1"))


def test_the_weights_file_of_a_model_without_inputs_has_no_tensor_of_them(tmp_path):
    plain = Regressor(build(CNN, (1, 16, 16), 1), torch.zeros(1), torch.ones(1))
    bundle.save(tmp_path, plain, model=specs.to_dict(CNN), image_shape=(1, 16, 16), target_names=("a",), unit="GPa")
    assert not [name for name in load_file(tmp_path / bundle.WEIGHTS) if "scalars" in name]
    assert "inputs" not in json.loads((tmp_path / bundle.SPEC).read_text())
