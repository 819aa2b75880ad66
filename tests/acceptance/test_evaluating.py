"""A trained model is evaluated on new labelled images: by alias, by version, and as a downloaded folder."""

import base64
import json
import shutil
import zlib

import folders
import pytest
from mlflow import MlflowClient

from data_pipeline.dataset import load
from hpo.tracking import foreign

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


def test_a_model_is_evaluated_by_alias_version_and_folder(shell, tmp_path):
    data, study, page = tmp_path / "steel", tmp_path / "steel-evaluated.toml", tmp_path / "page.html"
    data.mkdir()
    folders.phases(data)
    study.write_text(folders.STUDY.format(epochs=3))
    shell.hpo("run", "--study", study, "--data", data)
    shell.hpo("promote", "--study", shell.queue.studies()[0].name, "--force")  # after three epochs
    shell.hpo("download", tmp_path / "champion")
    everything = load(data)
    again = tmp_path / "again"  # the test cells of the study itself
    again.mkdir()
    table = (data / "results.csv").read_text().splitlines()
    files = [everything.names[index] for index in everything.split.test]
    for file in files:
        shutil.copy(data / file, again)
    rows = [line for line in table[1:] if any(file.endswith(f"/{line.partition(';')[0]}.png") for file in files)]
    (again / "results.csv").write_text("\n".join([table[0], *rows]))
    name = shell.queue.studies()[0].name
    closing = next(job.closing for job in shell.queue.jobs(name) if job.closing)
    version = f"{closing.model_name}/{closing.winner.version}"

    results = [shell.json("evaluate", model, again) for model in ("champion", version, tmp_path / "champion")]
    for result in results:
        assert result["model"] == {"name": closing.model_name, "version": closing.winner.version}
        assert result["scores"]["model"]["nmse"] == pytest.approx(closing.winner.test.nmse, rel=1e-6)
        recorded = {predictor: scores.test for predictor, scores in closing.predictors.items()}
        for row in result["targets"]:
            expected = closing.winner.test if row["predictor"] == "model" else recorded[row["predictor"]]
            assert row["r2"] == pytest.approx(expected.per_target["r2"][0], rel=1e-6)
            assert row["nrmse"] == pytest.approx(expected.per_target["nrmse"][0], rel=1e-6)
            assert row["nrmse_low"] <= row["nrmse"] <= row["nrmse_high"]
        assert all(row["outside"] is not None for row in result["distance"])

    output = shell.hpo("evaluate", "@champion", data, "-o", page)
    assert "of 24 images are among those that the model was trained or selected on" in " ".join(output.split())
    assert "YS" in output and "MPa" in output and "micrographs/m" in output
    text = page.read_text()
    assert text.count("<svg") == 3 and "cubic polynomial in the volume fraction" in text

    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'evaluation'")
    assert len(runs) == 2  # of two data sets: the same again is the same run
    run = client.get_run(results[0]["run_id"])  # a search leaves out what went in
    winner = next(job for job in shell.trials(name) if job.number == closing.winner.number)
    assert [model.model_id for model in run.inputs.model_inputs] == [winner.result.model_id]
    assert run.data.metrics["evaluation_nmse"] == results[0]["scores"]["model"]["nmse"]
    assert {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")} == {
        "evaluation/evaluation.html",
        "evaluation/evaluation.json",
    }
    view = experiment.tags[foreign.view_tag("hpo")].removeprefix("deflate;")
    listed = json.loads(zlib.decompress(base64.b64decode(view)))["searchFilter"]
    kinds = {run.data.tags["hpo.kind"] for run in client.search_runs([experiment.experiment_id], listed)}
    assert kinds == {"trial", "predictor"}
    tags = client.get_model_version(closing.model_name, str(closing.winner.version)).tags
    assert run.info.run_id in tags.values()
    shell.hpo("doctor")

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    folders.numbered(wrong)
    output = shell.hpo("evaluate", "champion", wrong, code=1)
    assert output.startswith("hpo: ") and output.count("hpo: ") == 1 and "YS in MPa" in output
