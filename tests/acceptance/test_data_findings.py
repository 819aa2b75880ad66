"""Wrong labels stop a new study before it is planned; what dataset.toml accepts stands with the study."""

import cells
import numpy as np
import pytest
from mlflow import MlflowClient

from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance


def test_wrong_labels_stop_a_new_study_and_are_told_of_one_that_is_planned(shell, tmp_path):
    data = cells.make(tmp_path / "wrong", count=40)
    table = next(data.glob("*.csv"))
    rows = np.loadtxt(table, delimiter=",")
    rows[[7, 30], 1] *= -1
    table.write_text("\n".join(",".join([str(int(row[0])), *map(repr, row[1:].tolist())]) for row in rows))
    study = cells.study(tmp_path, "wrongly-labelled", data=data, epochs=30, rates="[1e-2]")
    sentence = "2 of 40 tensors have an eigenvalue of at most zero: 7_cell.png (row 7), 30_cell.png (row 30)."
    refused = shell.hpo("run", "--study", study, code=1)
    assert refused.count(sentence) == 1 and 'accept = ["not-positive-definite"]' in refused
    assert not shell.queue.studies()
    description = (data / "dataset.toml").read_text()
    (data / "dataset.toml").write_text('accept = ["not-positive-definite"]\n' + description)
    doubt = "C11: 2 of 40 labels have the other sign, as if taken times -1: 7_cell.png (row 7), 30_cell.png (row 30)."
    said = shell.hpo("run", "--study", study)
    assert said.count(sentence) == 1 and said.count(f"Note: {doubt} [flipped-signs]") == 1
    row = shell.queue.study("wrongly-labelled")
    assert any(note.startswith(sentence) for note in row.facts.findings)
    page = (
        Tracker(shell.tracking_uri)
        .download_artifact(row.facts.study_run_id, "data/page.html", tmp_path / "page")
        .read_text()
    )
    assert "Accepted: not-positive-definite" in page and sentence in page and page.count("data:image/png") > 40
    link = f"#/experiments/{row.facts.experiment_id}/runs/{row.facts.study_run_id}/artifacts/data/page.html"
    assert f"data: {shell.tracking_uri}/{link}" in shell.hpo("show", "wrongly-labelled")
    client = MlflowClient(shell.tracking_uri)
    described = client.get_run(row.facts.study_run_id).data.tags["mlflow.note.content"]
    assert f"[Images and labels]({link})" in described
    shell.hpo("report", "--study", "wrongly-labelled", "-o", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    model = client.get_model_version(row.facts.model_name, "1").description
    for place in (report, described, model):  # the report, the study's run and the model
        assert sentence in place.replace("\\", "") and doubt in place.replace("\\", "")
    (data / "dataset.toml").write_text(description)  # now an error again, but the study is planned
    assert shell.hpo("run", "--study", study).count(sentence) == 1
