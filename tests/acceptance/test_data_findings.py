"""Wrong labels stop a new study before it is planned; what dataset.toml accepts stands with the study."""

import cells
import numpy as np
import pytest

from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance


def test_wrong_labels_stop_a_new_study_and_are_told_of_one_that_is_planned(shell, tmp_path):
    data = cells.make(tmp_path / "wrong", count=40)
    table = next(data.glob("*.csv"))
    rows = np.loadtxt(table, delimiter=",")
    rows[[7, 30], 1] *= -1
    table.write_text("\n".join(",".join([str(int(row[0])), *map(repr, row[1:].tolist())]) for row in rows))
    study = cells.study(tmp_path, "wrongly-labelled", data=data, epochs=1, rates="[1e-3]")
    sentence = "2 of 40 tensors have an eigenvalue of at most zero: 7_cell.png (row 7), 30_cell.png (row 30)."
    refused = shell.hpo("run", "--study", study, code=1)
    assert refused.count(sentence) == 1 and 'accept = ["not-positive-definite"]' in refused
    assert not shell.queue.studies()
    description = (data / "dataset.toml").read_text()
    (data / "dataset.toml").write_text('accept = ["not-positive-definite"]\n' + description)
    assert shell.hpo("run", "--study", study).count(sentence) == 1
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
    assert (
        f"[Images and labels]({link})"
        in Tracker(shell.tracking_uri).tags(row.facts.study_run_id)["mlflow.note.content"]
    )
    shell.hpo("report", "--study", "wrongly-labelled", "-o", tmp_path / "report")
    assert sentence in (tmp_path / "report" / "report.md").read_text().replace("\\", "")
    (data / "dataset.toml").write_text(description)  # now an error again, but the study is planned
    assert shell.hpo("run", "--study", study).count(sentence) == 1
