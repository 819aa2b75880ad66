"""Trials that begin with the weights of a trained model: identity, refusals, and training from there."""

import numpy as np
import pytest

from data_pipeline.dataset import load
from hpo import study
from hpo.errors import StudyError
from hpo.operations.starts import starting_models
from hpo.planning.preparation import prepare
from models import bundle, specs
from models.training import Training

CNN = """
[data]
path = "{data}"
[model]
family = "cnn"
filters = {filters}
kernel_size = 3
dropout = 0.0
[training]
epochs = 2
start_from = "{start}"
"""


def trained(data, *, epochs=2, initial=None, **values):
    """A small network that was trained on the data set."""
    model = specs.from_dict({"family": "cnn", "filters": 2, "kernel_size": 3, "dropout": 0.0})
    run = Training(
        model,
        specs.TrainingSpec(epochs=epochs),
        train=data.part(data.split.train),
        validation=data.part(data.split.validation),
        target_names=data.target_names,
        initial=initial,
        **values,
    )
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, request):
    """The folder of a trained model, with its data set's folder."""
    folder = request.getfixturevalue("data")
    data, to = load(folder), tmp_path_factory.mktemp("model")
    run = trained(data)
    list(run.epochs())
    spec = {"family": "cnn", "filters": 2, "kernel_size": 3, "dropout": 0.0}
    shape = data.images.shape[1:]
    bundle.save(to, run.best_regressor(), model=spec, image_shape=shape, target_names=data.target_names, unit="GPa")
    return folder, to


def prepared(path, text):
    path.write_text(text)
    chosen = study.load(str(path))
    with starting_models([chosen]) as starts:
        return prepare(chosen, starts=starts[chosen.name])


def test_the_hash_of_the_weights_is_part_of_the_identity(model, tmp_path, monkeypatch):
    data, folder = model
    monkeypatch.setattr("hpo.operations.starts._rows", list)
    plan = prepared(tmp_path / "warm.toml", CNN.format(data=data, filters=2, start=folder))
    (start,) = plan.starts.values()
    assert plan.canonical["start_from"] == {str(folder): start.model.sha256}
    (spec, _), *_ = plan.specs()
    assert spec.start == start.model and spec.params()["start.sha256"] == start.model.sha256
    assert study.restore("warm", plan.canonical).starting_models == [str(folder)]
    file = folder / bundle.WEIGHTS
    content, touched = file.read_bytes(), bytearray(file.read_bytes())
    touched[-1] ^= 1
    file.write_bytes(bytes(touched))
    again = prepared(tmp_path / "warm.toml", CNN.format(data=data, filters=2, start=folder))
    file.write_bytes(content)
    assert again.identity != plan.identity


def test_weights_that_do_not_fit_are_refused_with_a_list_of_them(model, tmp_path, monkeypatch):
    data, folder = model
    monkeypatch.setattr("hpo.operations.starts._rows", list)
    with pytest.raises(
        StudyError, match=r"of its tensors do not fit the network of wide at .*expected \(4, 1, 3, 3\), "
    ) as said:
        prepared(tmp_path / "wide.toml", CNN.format(data=data, filters=4, start=folder))
    assert "found (2, 1, 3, 3)" in str(said.value) and "filters = 2" in str(said.value)
    with pytest.raises(StudyError, match="expected a model's weights"):
        prepared(tmp_path / "none.toml", CNN.format(data=data, filters=2, start=tmp_path))


def test_a_planned_study_keeps_the_model_that_its_name_meant(model, tmp_path, monkeypatch):
    data, folder = model
    monkeypatch.setattr("hpo.operations.starts._rows", list)
    plan = prepared(tmp_path / "kept.toml", CNN.format(data=data, filters=2, start=folder))
    row = type("Row", (), {"facts": plan.facts, "canonical": plan.canonical})
    monkeypatch.setattr("hpo.operations.starts._rows", lambda: [row])
    (folder / bundle.WEIGHTS).rename(folder / "moved")
    try:
        again = prepared(tmp_path / "kept.toml", CNN.format(data=data, filters=2, start=folder))
    finally:
        (folder / "moved").rename(folder / bundle.WEIGHTS)
    assert again.identity == plan.identity


def test_a_training_that_starts_from_a_model_begins_where_that_ended(model):
    data, initial = load(model[0]), dict(bundle.load(model[1])[0].network.state_dict())
    cold, warm = trained(data, epochs=1), trained(data, epochs=1, initial=initial)
    before = bundle.load(model[1])[0].network.state_dict()
    assert all(np.array_equal(values, before[name]) for name, values in warm.network.state_dict().items())
    (first,), (other,) = list(cold.epochs()), list(warm.epochs())
    assert other.metrics["train/nmse"] < first.metrics["train/nmse"]


def test_trials_begin_with_no_network_that_code_of_its_author_makes(model, tmp_path, monkeypatch):
    data, folder = model
    monkeypatch.setattr("hpo.operations.starts._rows", list)
    (copy := tmp_path / "own" / "source").mkdir(parents=True)
    for file in (bundle.WEIGHTS, bundle.SPEC):
        (copy.parent / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(StudyError, match="expected a model of one of hpo's families, found one whose network is code"):
        prepared(tmp_path / "own.toml", CNN.format(data=data, filters=2, start=copy.parent))
