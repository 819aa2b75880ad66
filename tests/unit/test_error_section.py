"""The section on errors fits targets that are no stiffness tensor, and images of several phases."""

import dataclasses
from types import SimpleNamespace

import folders
import numpy as np
import records

from data_pipeline.dataset import load
from hpo.report import sections
from hpo.scores.evidence import Evidence, Winner


def test_errors_of_phases_with_a_target_of_ones_own_have_pictures_and_no_tensor(tmp_path):
    folders.phases(tmp_path)
    data = load(tmp_path)
    truth = data.targets[data.split.test]
    job = SimpleNamespace(id=1, number=1, kind="trial", spec=records.spec(), result=records.result(0.5))
    winner = Winner(
        study="grid",
        job=job,
        entry=SimpleNamespace(point={}, weights="", parameters=1, test=None, verdict="good"),
        nmse=0.5,
        points=1,
        curves={},
        predicted=truth + 1.0,
        tags={},
    )
    section = sections._errors(Evidence(closed=[], winners=[winner], dataset=data, split=data.split))
    assert [table.name for table in section.tables] == ["worst"]
    assert [picture.name for picture in section.pictures] == ["parity", "errors", "worst"]
    greys = sections._grey(data, data.split.test[:2])
    assert greys.shape == (2, 16, 16) and set(np.unique(greys)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    plain = dataclasses.replace(data, images=data.images[:, :1])
    assert np.array_equal(sections._grey(plain, data.split.test[:2]), data.images[data.split.test[:2], 0])
