"""A label of zero, a component that does not vary in a split: scores that do not exist, and networks all the same."""

import json
import math

import cells
import numpy as np
import pandas
import pytest
from mlflow import MlflowClient

from data_pipeline import dataset as data_sets
from data_pipeline.checks import look
from data_pipeline.split import split

STUDY = """
[data]
path = "{data}"
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [1, 2]
[training]
epochs = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 cells: a zero and a component that does not vary in the validation split, and in the test split."""
    folder = cells.make(tmp_path_factory.mktemp("data") / "zeros", count=40)
    table = next(folder.glob("*.csv"))
    rows = np.loadtxt(table, delimiter=",")
    parts = split(40)
    rows[parts.validation[0], 1 + 5] = 0.0
    rows[parts.validation, 1 + 6] = 0.1
    rows[parts.test[1], 1 + 4] = 0.0
    rows[parts.test, 1 + 8] = 12.5
    lines = [",".join([str(int(row[0])), *(repr(float(value)) for value in row[1:])]) for row in rows]
    table.write_text("\n".join(lines) + "\n")
    return folder


def test_which_scores_will_not_exist_is_said_before_anything_is_trained(folder):
    data = data_sets.load(folder)
    said = [one.sentence for one in look(data, data.names) if one.name in ("constant-labels", "zero-labels")]
    assert said == [
        "C44: no R² in the validation split, for its labels do not vary there.",
        "C13: no MAPE in the validation split, for one of its labels there is zero.",
        "C66: no R² in the test split, for its labels do not vary there.",
        "C23: no MAPE in the test split, for one of its labels there is zero.",
    ]


def strict(text):
    """JSON as its standard has it: without NaN and infinity."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.long
@pytest.mark.acceptance
def test_networks_are_trained_recorded_closed_and_reported_without_them(folder, shell, tmp_path):
    study = tmp_path / "zeros.toml"
    study.write_text(STUDY.format(data=folder))
    shell.hpo("run", "--study", study)
    jobs = shell.trials("zeros")
    assert [job.state for job in jobs] == ["done", "done"] and {job.attempt for job in jobs} == {1}
    closing = next(job for job in shell.queue.jobs("zeros") if job.kind == "closing")
    for job in jobs:
        found = job.result.validation.to_dict()
        assert found["per_target"]["r2"][6] is None and found["per_target"]["mape"][5] is None
        assert sum(value is None for values in found["per_target"].values() for value in values) == 2
        known = [value for value in found["per_target"]["r2"] if value is not None]
        assert found["r2"] == pytest.approx(math.fsum(known) / 8)
    client, row = MlflowClient(shell.tracking_uri), shell.queue.study("zeros")
    raw = client.download_artifacts(row.facts.study_run_id, "tables/result.json", str(tmp_path))
    with open(raw) as file:
        test = strict(file.read())["winner"]["test"]
    assert test == closing.closing.winner.test.to_dict()
    assert test["per_target"]["r2"][8] is None and test["r2"] is not None and test["mape"] is not None
    metrics = client.get_run(jobs[0].run_id).data.metrics
    assert "best_val_r2" in metrics and "best_val_r2/C44" not in metrics and "best_val_r2/C11" in metrics
    strict(shell.hpo("trials", "--study", "zeros", "--json"))
    strict(shell.hpo("compare", "zeros/0", "zeros/1", "--json"))
    shell.hpo("report", "--study", "zeros", "-o", tmp_path / "report")
    for table in (tmp_path / "report" / "tables").glob("*.json"):
        strict(table.read_text())
    by_target = pandas.read_csv(tmp_path / "report" / "tables" / "targets-r2.csv")
    assert by_target["R² C66"].isna().all() and by_target["R² mean"].notna().all()
    assert "Healthy" in shell.hpo("doctor", "--study", "zeros")
