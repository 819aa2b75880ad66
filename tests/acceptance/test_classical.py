"""Classical predictors are searched, promoted, handed out and predict like networks; every report has one."""

import pandas
import pytest

pytestmark = pytest.mark.acceptance

STUDY = """
[data]
path = "{data}"
[model]
family = "descriptors"
components = 5
trees = 20
[space]
regressor = ["ridge", "gaussian-process", "trees"]
"""


def test_descriptors_go_from_a_study_to_a_prediction_and_rival_every_network(shell, data, tmp_path):
    study = tmp_path / "classical.toml"
    study.write_text(STUDY.format(data=data))
    output = shell.hpo("run", "--study", study)
    assert "R² descriptors" in output
    (name,) = (row.name for row in shell.queue.studies() if row.name.startswith("classical"))
    jobs = [job for job in shell.queue.jobs(name) if job.kind == "trial"]
    assert len(jobs) == 3 and all(job.epochs == 1 and job.attempt == 1 for job in jobs)
    assert shell.json("show", name)["settings"]["model"]["edges"] == "periodic"
    shell.hpo("report", "-o", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "Is a network needed here? Ridge on descriptors of the image explains" in report
    assert ": the selected model is none." in report
    assert report.count("descriptors, ridge") >= 4  # the tables of scores, and by target
    shell.hpo("download", tmp_path / "champion")
    (tmp_path / "predictions.csv").write_text(
        shell.hpo("predict", tmp_path / "champion", *sorted(data.glob("*.png"))[:2])
    )
    frame = pandas.read_csv(tmp_path / "predictions.csv")
    assert frame.shape == (2, 10) and frame.iloc[:, 1:].notna().all(axis=None)
