"""Models of one data set through its versions: what their scores are of, and which of them is the champion."""

import threading

import cells
import numpy as np
import pandas
import pytest
import records

from data_pipeline import dataset, npz
from hpo import study
from hpo.planning.preparation import prepare
from hpo.scores import ranking
from hpo.study.records import Fold
from hpo.worker import protocol, train_trial
from models import metrics

MODEL = {"family": "cnn", "filters": 2, "kernel_size": 3, "dropout": 0.0}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The folders of three data sets: each extends the one before it."""
    parent = tmp_path_factory.mktemp("line")
    return [
        cells.make(parent / f"v{number}", count=count, extends=f"../v{number - 1}" if number else "")
        for number, count in enumerate((40, 60, 80))
    ]


def train(folder, path, **spec):
    request = protocol.Train(
        spec=records.spec(model=MODEL, training={"epochs": 2, "batch_size": 8}, **spec), data=path, checkpoint=None,
        start=None, folder=folder, cache=folder / "cache", device="cpu", checkpoint_interval=60.0,
    )  # fmt: skip
    return train_trial.train(request, lambda message: None, threading.Event())


@pytest.mark.usefixtures("one_thread")
def test_a_trial_is_scored_on_the_validation_images_of_each_earlier_data_set(line, tmp_path):
    first, second, third = map(dataset.load, line)
    npz.save_npz(third, path := tmp_path / "data.npz")
    trained = train(tmp_path / "whole", path)
    table = pandas.read_csv(trained.predictions, index_col="image")
    for number, earlier in enumerate((first, second)):
        own = table.loc[[earlier.names[index] for index in earlier.split.validation]]
        truth, predicted = (own[[f"{name} {kind}" for name in first.target_names]] for kind in ("true", "predicted"))
        variance = earlier.targets[earlier.split.train].var(axis=0)
        nmse = metrics.scores(predicted.to_numpy(), truth.to_numpy(), train_variance=variance).nmse
        key = prepare(study.load("baseline", [f"data.path={line[2]}"])).facts.data.earlier[number].key
        assert trained.common[key] == pytest.approx(nmse, rel=1e-6) and nmse != trained.best_val_nmse
    assert len(trained.common) == 2
    npz.save_npz(first, path := tmp_path / "first.npz")
    assert train(tmp_path / "alone", path).common is None


@pytest.mark.usefixtures("one_thread")
def test_folds_are_scored_on_all_earlier_images_and_a_refit_has_their_mean(line, tmp_path):
    from data_pipeline.folds import digest, folds

    data = dataset.load(line[1])
    npz.save_npz(data, path := tmp_path / "data.npz")
    fold = Fold(number=0, count=3, digest=digest(folds(data, 3)))
    (nmse,) = train(tmp_path / "fold", path, fold=fold).common.values()
    part = folds(data, 3)[0]
    (earlier,) = data.earlier
    assert 0 < len(earlier.within(part.validation)) < len(part.validation) and np.isfinite(nmse)
    job = type("Job", (), {"result": records.result(0.5, common={"k": nmse, "other": 1.0})})
    refit = ranking.refit_of([job, type("Job", (), {"result": records.result(0.7, common={"k": 3 * nmse})})])
    assert refit.common == {"k": pytest.approx(2 * nmse)}
    assert ranking.refit_of([type("Job", (), {"result": records.result(0.7)})]).common is None


def test_an_extended_data_set_is_planned_as_before_and_names_those_before_it(line):
    plans = [prepare(study.load("baseline", [f"data.path={folder}"])) for folder in line]
    facts = [plan.facts.data for plan in plans]
    assert [version.key for version in facts[2].earlier] == [one.key for one in facts[:2]]
    assert facts[0].earlier is None and "earlier" not in facts[0].to_json()
    assert not any("earlier" in str(plan.canonical) for plan in plans), "the identity is of digests alone"
