"""The section on errors fits targets that are no stiffness tensor, and images of several phases."""

import dataclasses
from types import SimpleNamespace

import folders
import numpy as np
import pytest
import records

from data_pipeline.dataset import load
from hpo.report import error_section, thumbnails
from hpo.scores import analysis
from hpo.scores.evidence import Evidence, Winner
from models import metrics


def evidence(data, predicted):
    scores = metrics.scores(predicted, data.targets[data.split.test], train_variance=np.ones(predicted.shape[1]))
    job = SimpleNamespace(id=1, number=1, kind="trial", spec=records.spec(), result=records.result(0.5))
    winner = Winner(
        study="grid",
        job=job,
        entry=SimpleNamespace(point={}, weights="", parameters=1, test=scores, verdict="good"),
        nmse=0.5,
        points=1,
        curves={},
        predicted=predicted,
        tags={},
    )
    return Evidence(closed=[], winners=[winner], dataset=data, split=data.split)


def test_missing_labels_stand_as_such_among_the_errors_and_count_in_none(tmp_path):
    folders.missing(tmp_path)
    (tmp_path / "dataset.toml").write_text('missing = "mask"')
    data = load(tmp_path)
    truth = data.targets[data.split.test]
    assert np.isnan(truth).any()
    everything = evidence(data, np.where(np.isnan(truth), 1e9, truth) + 1.0)
    section = error_section.errors(everything.tested)
    label, prediction = section.tables[0].rows[:2]
    lacking = next(row for row in section.tables[0].rows if row.values["what"] == "label" and row.values["t7"] is None)
    assert lacking.values["t0"] is not None and "nan" not in repr(section)
    assert label.values["NRMSE"] == prediction.values["NRMSE"] < 10  # without the predictions of what is missing
    scores = everything.winners[0].entry.test
    tables = {table.name: table for table in error_section.by_target(everything.tested, {"grid": scores})}
    assert tables["targets-labels"].rows[0].values["t7"] == (~np.isnan(truth[:, 7])).sum()
    assert tables["targets-rmse"].rows[0].values["t7"] == 1.0
    samples = everything.tested.samples(everything.winners[0].predicted)
    assert all(np.isfinite(analysis.interval(samples[score])).all() for score in ("nmse", "mse", "nrmse", "mape"))
    assert everything.mean_nmse > 0


def test_errors_of_phases_with_a_target_of_ones_own_have_pictures_and_no_tensor(tmp_path):
    folders.phases(tmp_path)
    data = load(tmp_path)
    section = error_section.errors(evidence(data, data.targets[data.split.test] + 1.0).tested)
    assert [table.name for table in section.tables] == ["worst"]
    assert [picture.name for picture in section.pictures] == ["parity", "errors", "worst"]
    (worst,) = section.tables
    shares = [
        {name: value for name, value in row.values.items() if name.startswith("volume fraction of phase [")}
        for row in worst.rows
    ]
    assert {len(own) for own in shares} == {5} and all(sum(own.values()) == pytest.approx(1) for own in shares)
    assert len({tuple(own.values()) for own in shares}) == len(worst.rows) / 2, "each image has its own"
    assert section.pictures[1].svg.count("volume fraction of phase [") == 5
    greys = thumbnails.grey(data, data.split.test[:2])
    assert greys.shape == (2, 16, 16) and set(np.unique(greys)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    plain = dataclasses.replace(data, images=data.images[:, :1])
    assert np.array_equal(thumbnails.grey(plain, data.split.test[:2]), data.images[data.split.test[:2], 0])
