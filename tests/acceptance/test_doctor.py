"""`hpo doctor` finds what was damaged behind our back, says so, and mends what can be mended."""

import itertools
import os
import socket
import time

import cells
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState
from shell import PATIENCE, Shell, check_recorded_once, mirrored
from sqlalchemy import text

from hpo import settings
from hpo.closing import promotion
from hpo.operations import doctor, invariants
from hpo.operations.connection import opened
from hpo.services.serving import Services
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance
EPOCHS = 20
SEEDS = itertools.count(100)  # data of its own for each study: all on one set compete for one champion


@pytest.fixture
def closed(shell: Shell, tmp_path) -> Shell:
    """A shell whose one study has run to its end, under a name and on data of its own."""
    seed = next(SEEDS)
    data = cells.make(tmp_path / "own", seed=seed)
    shell.hpo("run", "--study", cells.study(tmp_path, f"ill-{seed}", data=data, epochs=EPOCHS, rates="[1e-2]"))
    shell.hpo("promote", "--study", f"ill-{seed}", "--force")
    return shell


def name(closed: Shell) -> str:
    (row,) = closed.queue.studies()
    return row.name


def damage(closed: Shell, statement: str, **values) -> None:
    with closed.queue.engine.begin() as connection:
        connection.execute(text(statement), values)


def test_caches_that_nothing_used_for_a_week_are_found_and_removed(tmp_path):
    for name, days in (("old", 8), ("new", 6)):
        for path in (f"data/{name}.npz", f"features/{name}.safetensors", f"features/{name}.17.tmp"):
            file = tmp_path / "cache" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
            os.utime(file, (time.time() - days * 86400,) * 2)
    found = list(doctor._caches(tmp_path, []))
    assert len(found) == 3 and all("/old." in each.what for each in found)
    for each in found:
        each.remedy()
    left = {path.name for path in (tmp_path / "cache").rglob("new.*")}
    assert {path.name for path in (tmp_path / "cache").rglob("*.*")} == left and len(left) == 3


def test_what_somebody_did_in_mlflow_and_optuna_is_found_and_mended(closed):
    client = MlflowClient(closed.tracking_uri)
    first, second = closed.trials(name(closed))
    client.delete_run(first.run_id)
    client.set_terminated(second.run_id, status="KILLED")
    experiment = client.get_run(second.run_id).info.experiment_id
    ghost = client.create_run(experiment, tags={"hpo.key": f"{name(closed)}/0/0", "hpo.kind": "trial"}).info.run_id
    client.create_logged_model(experiment, "model", tags={"hpo.key": f"{name(closed)}/0/0/x"})
    own = client.create_logged_model(experiment, "mine").model_id
    damage(closed, "UPDATE trials SET state = 'RUNNING' WHERE number = 1")

    found = closed.hpo("doctor", code=1)
    assert f"expected the one MLflow run {first.run_id}, found ['{ghost}']" in found
    assert f"trial 1 of {name(closed)}: expected FINISHED in MLflow, found KILLED" in found
    assert f"trial 1 of {name(closed)}: expected COMPLETE in Optuna, found RUNNING" in found
    assert f"the MLflow run {ghost} ({name(closed)}/0/0) belongs to no trial" in found
    assert "is no trial's result" in found
    assert "`hpo doctor --fix` repairs what it can." in found

    assert "Repaired: " in closed.hpo("doctor", "--fix")
    assert "Healthy" in closed.hpo("doctor")
    assert client.get_logged_model(own).model_id == own
    client.delete_logged_model(own)
    check_recorded_once(closed, name(closed), points=2, epochs=EPOCHS)


@pytest.mark.long
def test_dead_trials_of_a_closed_study_are_reported(closed):
    damage(closed, "UPDATE hpo.job SET state = 'dead', reason = 'out of memory' WHERE number = 0")
    found = closed.hpo("doctor", code=1)
    assert f"{name(closed)} is closed, but 1 of 2 trials is dead: out of memory (1)." in found
    assert f"`hpo run --study {name(closed)} --retry` trains them again" in found
    damage(closed, "UPDATE hpo.job SET state = 'done', reason = NULL WHERE number = 0")


@pytest.mark.long
@pytest.mark.parametrize("file", ["spec.json", "weights.safetensors"])
def test_a_file_that_was_changed_in_the_store_is_found_and_said_not_to_be_used(closed, tmp_path, file):
    client = MlflowClient(closed.tracking_uri)
    winner = min(closed.trials(name(closed)), key=lambda job: job.result.best_val_nmse)
    changed = promotion.fetch(Tracker(closed.tracking_uri), winner, tmp_path / "model") / file
    *all_but_one, last = changed.read_bytes()
    changed.write_bytes(bytes([*all_but_one, last ^ 1]))  # one bit: it may well load and predict
    client.log_model_artifact(winner.result.model_id, str(changed))
    found = closed.hpo("doctor", "--fix", code=1)
    assert f"I4: {name(closed)}: " in found and f"@champion, @{name(closed)}" in found
    assert f"{file} is not the file that was logged" in found and "do not use these files" in found
    model = closed.queue.study(name(closed)).facts.model_name
    for alias in ("champion", name(closed)):
        client.delete_registered_model_alias(model, alias)
    assert f"is not promoted again: {file} is not the file" in closed.hpo("promote", "--study", name(closed), code=1)
    assert client.get_registered_model(model).aliases == {}, "no alias goes to what is known to be damaged"


LOST = (
    ("DELETE FROM hpo.epoch WHERE number = 7", "I2", "expected epochs 1 to 19 without a gap"),
    ("UPDATE hpo.job SET result = NULL WHERE number = 0", "I1", "is done, but its result is None"),
    ("DELETE FROM hpo.job WHERE number = 1", "I1", "expected the 2 planned trials in the queue, found 1"),
    ("UPDATE hpo.job SET state = 'dead', reason = NULL WHERE number = 0", "I1", "is dead without a reason"),
    ("UPDATE hpo.epoch SET metrics = jsonb_set(metrics, '{val/nmse}', '9') WHERE number = 3", "I2", "differs from"),
)


@pytest.mark.long
def test_a_healthy_study_is_called_so_and_lost_rows_are_found_by_their_invariant(closed):
    assert closed.json("doctor") == {"mended": 0, "findings": []}
    damage(closed, "CREATE TABLE job AS TABLE hpo.job; CREATE TABLE epoch AS TABLE hpo.epoch")
    for statement, rule, words in LOST:
        damage(closed, statement)
        with mirrored(closed, name(closed)) as shown:
            found = [(each.rule, each.what) for each in invariants.check(shown, models=False)]
        assert any(each == rule and words in what for each, what in found), found
        damage(closed, "DELETE FROM hpo.job")  # and back again, the epochs with their jobs
        damage(closed, "INSERT INTO hpo.job TABLE job; INSERT INTO hpo.epoch TABLE epoch")
    assert "Healthy" in closed.hpo("doctor")


MANY = """
[data]
path = "{data}"
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [1, 2]
learning_rate = [1e-2, 5e-3, 2e-3, 1e-3, 5e-4]
[training]
epochs = 40
"""


@pytest.mark.long
def test_it_raises_no_false_alarm_while_a_study_runs(shell, data, tmp_path):
    (tmp_path / "many.toml").write_text(MANY.format(data=data))
    shell.environment |= {"HPO_CHECKPOINT_INTERVAL": "0.05"}
    process = shell.start("run", "--study", tmp_path / "many.toml")
    shell.training("many", epochs=1)
    found, looks = [], 0
    read = settings.read(shell.environment)
    services = Services(shell.database_url, shell.tracking_uri)
    with opened(read, services) as connection:
        while process.poll() is None:
            found += [each.what for each in doctor.examine(connection, study="many")]
            looks += 1
    assert found == [] and looks > 5
    assert process.wait() == 0 and {job.state for job in shell.trials("many")} == {"done"}


@pytest.mark.long
def test_it_harms_no_running_study_and_shows_a_dead_workers_trial_as_waiting(shell, data, tmp_path):
    shell.environment |= {"HPO_LEASE": "5"}
    study = cells.study(tmp_path, "busy", data=data, epochs=3000)
    process = shell.start("run", "--study", study, "--trainers", 2)
    shell.training("busy", epochs=50)
    output = shell.start("doctor", "--fix").communicate(timeout=PATIENCE)[0]
    assert "Healthy" in output, output
    process.kill()
    left = shell.home / "work" / f"{socket.gethostname()}-1-abcdef"
    left.mkdir()
    time.sleep(5.5)  # its lease
    found = shell.start("doctor", "--fix").communicate(timeout=PATIENCE)[0]
    assert "Repaired" in found, found
    assert {job.state for job in shell.trials("busy")} == {"waiting"}
    with mirrored(shell, "busy") as shown:
        assert invariants.check(shown) == []
        states = shown.store.get_all_trials(shown.store.get_study_id_from_name("busy"))
    assert {trial.state for trial in states} == {TrialState.WAITING}
    client = MlflowClient(shell.tracking_uri)
    statuses = {client.get_run(job.run_id).info.status for job in shell.trials("busy") if job.run_id}
    assert statuses == {"SCHEDULED"}
    assert not left.exists()
    assert any(job.checkpoint for job in shell.trials("busy"))
