"""Transfer learning end to end, as users run it: weights, prerequisites, lineage, the sequence and its one table."""

import json
import subprocess
import sys

import cells
import official
import pandas
import psutil
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, Shell, check_recorded_once, trainers
from sqlalchemy import text

from hpo import study as study_files
from hpo.closing import promotion
from hpo.files import sha256_of
from hpo.study.records import WeightsFile
from hpo.tracking.client import Tracker

TINY = ("--epochs", 1, "--set", "space.backbone=['densenet121']", "--set", "training.batch_size=16")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Cells of 32x32 pixels: what five poolings need."""
    return cells.make(tmp_path_factory.mktemp("data") / "wide", count=30, size=32)


def runs(shell: Shell, study: str, kind: str = "trial"):
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name(study)
    return client.search_runs([experiment.experiment_id], f"tags.`hpo.kind` = '{kind}'")


def planned(shell: Shell, name: str) -> str:
    """The full name of the one study of that file."""
    (found,) = [row.name for row in shell.queue.studies() if study_files.file_name(row.name) == name]
    return found


@pytest.mark.acceptance
@pytest.mark.long
def test_fine_tuning_starts_from_its_heads_and_says_that_nothing_was_pretrained(shell, images, tmp_path):
    words = ("run", "--data", images, *TINY, "--set", "model.weights=none", "--trainers", 1)
    refused = shell.hpo(*words, "--study", "tl-finetune", code=1)
    assert "it has not been run" in refused
    assert "`hpo run --study tl-head`" in refused and "--with-prerequisites" in refused
    assert shell.queue.studies() == []

    output = shell.hpo(*words, "--study", "tl-finetune", "--with-prerequisites")
    head, finetune = planned(shell, "tl-head"), planned(shell, "tl-finetune")
    (first,) = shell.trials(head)
    (run,) = runs(shell, finetune)
    params, tags = run.data.params, run.data.tags
    assert (params["starts_from.run_id"], params["starts_from.study"]) == (first.run_id, head)
    assert params["starts_from.sha256"] == first.result.files["weights.safetensors"]
    assert (params["parameters"], params["trainable_parameters"]) == ("6970409", "6970409")
    assert runs(shell, head)[0].data.params["trainable_parameters"] == "16553"
    assert tags["hpo.weights"] == "not pretrained" and "not pretrained" in tags["mlflow.note.content"]
    assert "Not pretrained" in runs(shell, finetune, "study")[0].data.tags["mlflow.note.content"]
    assert "densenet121 (not pretrained)" in output and "NOT PRETRAINED" in output
    assert "densenet121, not pretrained" in output, "in the table of components, too"
    assert "not pretrained" in " ".join(shell.hpo("trials", "--study", finetune).split()[:12])
    comparison = output[output.index("Comparison:") :]
    for word in (
        head,
        finetune,
        "not pretrained",
        "volume fraction, cubic",
        "mean of the training labels",
        "6,970,409",
    ):
        assert word in comparison, word
    client = MlflowClient(shell.tracking_uri)
    for study in (head, finetune):
        files = client.list_artifacts(runs(shell, study, "study")[0].info.run_id, "tables")
        assert {"tables/comparison.csv", "tables/comparison.txt"} <= {file.path for file in files}
    assert f"compare: {shell.tracking_uri}/#/compare-experiments/" in comparison
    features = shell.home / "cache" / "features"
    assert len(list(features.glob("*.safetensors"))) == 2, "one of the training and one of the validation split"

    folder = promotion.fetch(Tracker(shell.tracking_uri), first, tmp_path / "model")  # the whole network, not its head
    rows = json.loads(shell.hpo("predict", folder, images / "3_cell.png", "--json"))
    assert len(rows["predictions"][0]) == 10


@pytest.mark.long
@pytest.mark.acceptance
def test_a_killed_fine_tuning_goes_on_in_the_same_run(shell, images):
    """To the same bits: tests/unit/test_transfer.py, and of a killed process tests/acceptance/test_crash_points.py."""
    words = ("run", "--study", "tl-finetune", "--with-prerequisites", "--data", images, "--trainers", 1)
    words += ("--set", "space.backbone=['densenet121']", "--set", "model.weights=none", "--epochs", 8, "--seed", 3)
    process = shell.start(*words)
    job = shell.until(
        lambda: next(
            (
                each
                for row in shell.queue.studies()
                for each in shell.trials(row.name)
                if row.name.startswith("tl-finetune") and each.alive and each.checkpoint and each.epochs >= 2
            ),
            None,
        ),
        "a checkpoint of the fine-tuning",
    )
    (trainer,) = trainers(process)
    trainer.kill()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert f"trial 0 of {job.study} failed in attempt 1: trainer killed by SIGKILL" in output
    assert f"trial 0 of {job.study} goes on after epoch" in output
    check_recorded_once(shell, job.study, points=1, epochs=8)
    ended = shell.queue.job(job.id)
    assert (ended.attempt, ended.run_id) == (2, job.run_id)


# The made file's name stands in for torchvision's; trainers take it from the trial.
PATCHED = """
import sys
from hpo.cli.main import main
from models import weights
weights.FILES["densenet121"], weights.SOURCE = {name!r}, "http://127.0.0.1:9/"
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.acceptance
def test_pretrained_weights_are_asked_for_brought_and_part_of_the_study(shell, images, tmp_path, monkeypatch):
    shell.environment |= {"TORCH_HOME": str(tmp_path / "torch")}
    brought = official.make(tmp_path / "usb", "densenet121", monkeypatch)

    def hpo(*words: object, code: int = 0) -> str:
        command = [sys.executable, "-c", PATCHED.format(name=brought.name), *map(str, words)]
        process = subprocess.run(
            command, env=shell.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.returncode == code, process.stdout
        return process.stdout

    words = ("run", "--study", "tl-head", "--data", images, *TINY, "--trainers", 1)
    refused = hpo(*words, code=1)
    for part in (brought.name, "http://127.0.0.1:9/", "hpo weights FILE", str(tmp_path / "torch"), 'weights = "none"'):
        assert part in refused
    assert "missing" in hpo("weights", code=1)
    shown = " ".join(hpo(*words, "--dry-run").split())
    assert f"The pretrained weights {brought.name} are not on this machine yet" in shown
    assert "16,553" in shown and "GB of memory a trainer" in shown
    assert not shell.queue.installed()

    assert "here, its hash is right" in hpo("weights", brought)
    assert "not pretrained" not in hpo(*words).lower()
    (row,) = shell.queue.studies()
    (job,) = shell.trials(row.name)
    assert row.canonical["weights"] == {"densenet121": sha256_of(brought)}
    assert job.spec.weights == WeightsFile(name=brought.name, sha256=sha256_of(brought))
    (run,) = runs(shell, row.name)
    assert run.data.params["weights.sha256"] == sha256_of(brought) and run.data.tags["hpo.weights"] == "ImageNet"

    with shell.queue.engine.begin() as connection:  # there is something to train again
        connection.execute(text("UPDATE hpo.job SET state = 'waiting', result = NULL"))
    shell.environment |= {"TORCH_HOME": str(tmp_path / "another machine")}
    assert f"expected {tmp_path / 'another machine'}" in hpo("worker", "--study", row.name, code=1)


MICRO = """
[data]
path = "{data}"
[model]
family = "transfer"
backbone = "resnet18"
weights = "micro.pth.tar"
[training]
epochs = 2000
batch_size = 8
"""


@pytest.mark.long
@pytest.mark.acceptance
def test_a_worker_on_another_machine_gets_the_users_weights_from_the_study(shell, images, tmp_path):
    file = official.microscopy(tmp_path / "micro.pth.tar")
    (tmp_path / "micro-moved.toml").write_text(MICRO.format(data=images))
    process = shell.start("run", "--study", tmp_path / "micro-moved.toml")
    held = shell.until(
        lambda: next((job for job in shell.trials("micro-moved") if job.checkpoint and job.epochs >= 20), None),
        "a checkpoint",
    )
    left = trainers(process)
    process.kill()
    psutil.wait_procs(left, timeout=30)
    sha256 = sha256_of(file)
    file.unlink()

    shell.environment |= {"HPO_HOME": str(tmp_path / "another machine")}
    output = shell.hpo("worker", "--study", "micro-moved")
    assert " of micro-moved goes on after epoch " in output
    check_recorded_once(shell, "micro-moved", points=1, epochs=2000)
    (job,) = shell.trials("micro-moved")
    assert job.spec.weights == held.spec.weights == WeightsFile(name="micro.pth.tar", sha256=sha256)
    (run,) = runs(shell, "micro-moved")
    assert run.data.params["weights.sha256"] == sha256
    assert run.data.tags["hpo.weights"] == "pretrained: micro.pth.tar"
    assert shell.json("show", "micro-moved")["name"] == "micro-moved"


@pytest.mark.long
@pytest.mark.acceptance
def test_a_pruned_study_whose_trials_lose_patience_closes_and_is_reported(shell, data, tmp_path):
    space = ("--set", "space.filters=[2, 8]", "--set", "space.kernel_size=[3]")
    words = ("--data", data, "--epochs", 800, *space, "--set", "pruner.min_epochs=2", "--set", "training.patience=20")
    output = shell.hpo("run", "--study", "grid-fast", *words, "--trainers", 2)
    study = planned(shell, "grid-fast")
    jobs = shell.trials(study)
    pruned = [job for job in jobs if job.state == "pruned"]
    assert pruned and {job.state for job in jobs} == {"pruned", "done"}
    assert f"{len(pruned)} trials were ended early by the pruner" in output
    assert all(job.epochs >= 2 and "SuccessiveHalvingPruner" in job.reason for job in pruned)
    assert {run.data.tags["hpo.state"] for run in runs(shell, study)} == {"pruned", "done"}

    impatient = [job for job in jobs if job.state == "done" and job.epochs < 800]
    assert impatient and all(job.epochs == job.result.best_epoch + 20 for job in impatient)
    shell.hpo("report", "--study", study, "-o", tmp_path / "report")
    tables = {name: pandas.read_csv(tmp_path / f"report/tables/{study}-{name}.csv") for name in ("trials", "top")}
    trials, top = (table[table["config"].notna()].set_index("config") for table in tables.values())
    assert {config: row["state"] for config, row in trials.iterrows()} == {job.config: job.state for job in jobs}
    assert trials.loc[[job.config for job in pruned], "validation NMSE"].isna().all(), "no score of half a training"
    assert set(top.index) == {job.config for job in jobs} - {job.config for job in pruned}
    for job in impatient:
        assert top.loc[job.config, "validation NMSE"] == job.result.best_val_nmse
        assert top.loc[job.config, "last epoch NMSE"] == dict(shell.queue.curve(job.id))[job.epochs]["val/nmse"]
    text = (tmp_path / "report/report.md").read_text()
    assert f"{len(pruned)} of {len(jobs)} trials have no score" in text
    assert "grid, successive-halving" in text and "training.patience" in text


@pytest.mark.long
@pytest.mark.acceptance
def test_the_whole_protocol_runs_to_its_end_and_compares_eight_models(shell, tmp_path):
    data = cells.make(tmp_path / "cells", count=30, size=32)
    words = ("run", "--study", "protocol", "--data", data, "--epochs", 3, "--set", "model.weights=none")
    # All 24 points: tests/acceptance/test_run.py.
    words += (
        "--set",
        "grid:space.filters=[8]",
        "--set",
        "grid:space.kernel_size=[3]",
        "--set",
        "grid:space.dropout=[0.2]",
    )
    process = shell.start(*words)
    output, _ = process.communicate(timeout=900)  # seconds; 9 trials and four closings
    assert process.returncode == 0 and "Traceback" not in output, output
    names = [planned(shell, name) for name in ("baseline", "grid", "tl-head", "tl-finetune")]
    assert [len(shell.trials(name)) for name in names] == [1, 2, 3, 3]
    assert {job.state for name in names for job in shell.trials(name)} == {"done"}
    comparison = output[output.index("Comparison:") :]
    assert comparison.count("validation") - 1 == 8 + 3  # the title has the word, too
    assert comparison.count("not pretrained") == 6 and comparison.count("from scratch") == 2
    client = MlflowClient(shell.tracking_uri)
    versions = client.search_model_versions(f"name = '{shell.queue.study(names[2]).facts.model_name}'")
    bare = [each for each in versions if each.tags["hpo.study"] in names[2:]]
    assert bare and {each.tags["hpo.weights"] for each in bare} == {"not pretrained"}
    assert all("Not pretrained" in each.description for each in bare)
    starts = {run.data.params["starts_from.run_id"] for run in runs(shell, names[3])}
    assert starts == {job.run_id for job in shell.trials(names[2])}
