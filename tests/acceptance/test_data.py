"""A study's data set in the cache and at its run: never believed by its name, and mended."""

import dataclasses
import shutil

import cells
import pytest
from mlflow import MlflowClient
from shell import Shell, trainers

from data_pipeline import dataset as data_sets
from data_pipeline.dataset import DatasetError
from data_pipeline.npz import load_npz, sha256_in
from data_pipeline.phase import Phase
from hpo.tracking import data_sets as data_files

RATES = "[1e-2]"  # two points


def test_a_data_set_of_other_names_or_phases_is_another_file_of_the_cache(data, tmp_path):
    first = data_sets.load(data)
    other = tuple(f"0_mine{name}" for name in first.names)
    phases = {name: Phase(1.0, 0.3) for name in ("matrix", "inclusion")}
    sets = [
        first,
        dataclasses.replace(first, names=other),
        dataclasses.replace(first, description=dataclasses.replace(first.description, phases=phases)),
    ]
    assert {each.digest for each in sets} == {first.digest}
    files = [data_files.keep(tmp_path, each) for each in sets]
    assert len(set(files)) == 3
    for file, each in zip(files, sets, strict=True):
        found = load_npz(file, sha256=sha256_in(file))
        assert (found.names, found.description) == (each.names, each.description)


def test_a_damaged_file_of_the_cache_is_written_again(data, tmp_path):
    dataset = data_sets.load(data)
    file = data_files.keep(tmp_path, dataset)
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(DatasetError, match="the file was damaged"):
        load_npz(file, sha256=sha256_in(file))
    assert data_files.keep(tmp_path, dataset) == file and file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def cut(shell: Shell) -> None:
    """Damage all that lies in the cache."""
    for file in (shell.home / "cache" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.acceptance
@pytest.mark.long
def test_a_damaged_cache_costs_no_trial_an_attempt_and_is_uploaded_nowhere(shell, data, tmp_path):
    study = cells.study(tmp_path, "first", data=data, epochs=3, rates=RATES)
    shell.hpo("run", "--study", study)
    cut(shell)
    second = cells.study(tmp_path, "second", data=data, epochs=1500, rates=RATES)
    process = shell.start("run", "--study", second)
    job = shell.training("second")
    cut(shell)
    (trainer,) = trainers(process)
    trainer.kill()  # the next one has to read the file
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "the file was damaged" in output and "The data set of second is fetched again." in output, output
    assert [each.state for each in shell.trials("second")] == ["done", "done"]
    assert {each.id: each.attempt for each in shell.trials("second")}[job.id] == 2, "the kill's alone"
    client = MlflowClient(shell.tracking_uri)
    for name in ("first", "second"):
        facts = shell.queue.study(name).facts
        file = f"data/{facts.data.digest}.npz"
        arrived = client.download_artifacts(facts.study_run_id, file, str(tmp_path))
        load_npz(arrived, sha256=facts.data.sha256)


@pytest.mark.long
@pytest.mark.acceptance
def test_what_a_study_needs_is_missed_by_doctor_and_put_back(shell, tmp_path):
    data = cells.make(tmp_path / "own", seed=77)
    shell.hpo("run", "--study", cells.study(tmp_path, "needs", data=data, epochs=20, rates=RATES))
    row = shell.queue.study("needs")
    run, digest = row.facts.study_run_id, row.facts.data.digest
    client = MlflowClient(shell.tracking_uri)
    best, other = sorted(shell.trials("needs"), key=lambda job: job.result.best_val_nmse)

    damaged = tmp_path / f"{digest}.npz"
    damaged.write_bytes(b"PK" * 500)
    client.log_artifact(run, str(damaged), "data")
    table = tmp_path / f"trial-{best.number}.csv"
    table.write_text("image,split\n")
    client.log_artifact(run, str(table), "predictions")
    shutil.rmtree(shell.home / "cache")

    said = shell.hpo("report", "--study", "needs", "-o", tmp_path / "report", code=1)
    assert f"data/{digest}.npz of its MLflow run {run}" in said and "hpo doctor --fix --study needs" in said
    found = shell.hpo("doctor", "--study", "needs", code=1)
    assert f"The data set of needs, data/{digest}.npz of its MLflow run {run}, cannot be used" in found
    assert "put it there again from this machine" in found
    assert "Repaired: 1" in shell.hpo("doctor", "--study", "needs", "--fix", code=1), (
        "without it no predictions are read"
    )
    said = shell.hpo("report", "--study", "needs", "-o", tmp_path / "report", code=1)
    assert f"in predictions/trial-{best.number}.csv of the MLflow run {run}, found a damaged file" in said
    assert "Healthy" in shell.hpo("doctor", "--study", "needs", "--fix")
    shell.hpo("report", "--study", "needs", "-o", tmp_path / "report")

    models = {model.model_id: model for model in client.search_logged_models([row.facts.experiment_id])}
    client.delete_logged_model(models[other.result.model_id].model_id)
    found = shell.hpo("doctor", "--study", "needs", code=1)
    assert f"the model {other.result.model_id} of trial {other.number} of needs lacks" in found
    assert "restore the files from a backup" in found
