"""Workers that are killed or stopped: nothing is lost, nothing is done twice, and no bit changes."""

import dataclasses
import json
import signal
import time

import cells
import own_network
import psutil
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, check_recorded_once, clock, family, mirrored, resume, suspend, trainers, until_ended
from sqlalchemy import text

from hpo.operations import invariants
from hpo.queue import AttemptOutcome

pytestmark = pytest.mark.acceptance


def written(folder, name, *, data, is_own):
    """The file of a study of two trials and 500 epochs, of a network of hpo's or of a user's."""
    if is_own:
        return own_network.write(folder, data=data, name=name, epochs=500, training='loss = "models.net:cubes"')
    return cells.study(folder, name, data=data, epochs=500, rates="[1e-3]")


@pytest.mark.parametrize(
    ("calm_name", "stormy_name"),
    [
        pytest.param("calm", "stormy", marks=pytest.mark.long),
        pytest.param("calm-own", "stormy-own", marks=pytest.mark.long),
    ],
)
def test_killed_trainers_and_supervisors_lose_nothing_and_change_no_bit(shell, data, tmp_path, calm_name, stormy_name):
    is_own = stormy_name.endswith("own")
    calm = written(tmp_path, calm_name, data=data, is_own=is_own)
    shell.hpo("run", "--study", calm, "--trainers", 2)
    undisturbed = {json.dumps(job.spec.point): job.result for job in shell.trials(calm_name)}

    stormy = written(tmp_path, stormy_name, data=data, is_own=is_own)
    first = shell.start("run", "--study", stormy, "--trainers", 2)
    shell.training(stormy_name, epochs=100)
    trainers(first)[0].kill()
    shell.until(
        lambda: any(job.attempt == 2 for job in shell.trials(stormy_name)), "the killed trainer's trial runs again"
    )
    shell.until(
        lambda: any(job.alive and job.checkpoint and job.epochs >= 250 for job in shell.trials(stormy_name)),
        "a checkpoint",
    )
    left = trainers(first)
    first.kill()
    psutil.wait_procs(left, timeout=30)
    assert not any(trainer.is_running() for trainer in left), "trainers outlive their supervisor"

    output = shell.hpo("run", "--study", stormy, "--trainers", 2)
    check_recorded_once(shell, stormy_name, points=2, epochs=500)
    assert "Promoted" in output or "Nothing promoted" in output
    assert f" of {stormy_name} goes on after epoch " in output, "from its checkpoint"
    jobs = shell.trials(stormy_name)
    assert max(job.attempt for job in jobs) >= 2
    for job in jobs:
        expected = undisturbed[json.dumps(job.spec.point)]
        for name in ("best_val_nmse", "best_epoch", "last_val_nmse", "last_val_mse", "validation"):
            assert getattr(job.result, name) == getattr(expected, name), name
        assert job.result.files["weights.safetensors"] == expected.files["weights.safetensors"]


def test_ctrl_c_gives_back_within_seconds_and_the_same_command_goes_on(shell, data, tmp_path):
    study = cells.study(tmp_path, "stopped", data=data, epochs=300, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 2)
    job = shell.training("stopped", epochs=100)
    begin = clock(process)
    process.send_signal(signal.SIGINT)
    until_ended(process)
    assert clock(process) - begin < 8
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "The same command goes on." in output
    kept = shell.queue.job(job.id)
    assert (kept.state, kept.attempt) == ("waiting", 0)
    if kept.reason == "handed back":  # and not "stopped: SIGINT": its trainer was too slow on a busy machine
        assert kept.checkpoint.epoch >= job.epochs
        assert MlflowClient(shell.tracking_uri).get_run(kept.run_id).info.status == "SCHEDULED"

    shell.hpo("worker", "--study", "stopped", "--once", "--trainers", 1)
    assert sum(each.state == "done" for each in shell.trials("stopped")) == 1

    shell.hpo("run", "--study", study, "--trainers", 1)
    check_recorded_once(shell, "stopped", points=2, epochs=300)
    assert {job.attempt for job in shell.trials("stopped")} == {1}


@pytest.mark.slow
def test_a_worker_that_was_frozen_beyond_its_lease_stops_and_writes_nothing_more(shell, data, tmp_path):
    study = cells.study(tmp_path, "thawed", data=data, epochs=600, rates="[1e-3]")
    first = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("thawed", epochs=50)
    frozen = family(first)
    other = shell.queue.claim("thawed", worker="test", lease=3600)  # the second worker would train it while it waits
    suspend(frozen)
    second = shell.start("worker", "--study", "thawed", "--trainers", 1)
    shell.until(
        lambda: (now := shell.queue.job(job.id)).alive and now.attempt == 2 and now.epochs >= 50, "it is taken over"
    )
    frozen_too = family(second)
    suspend(frozen_too)  # so that whatever is written now is written by the first one
    time.sleep(1)  # what Postgres had already been asked
    before, curve = shell.queue.job(job.id), shell.queue.curve(job.id)
    assert before.state == "running" and shell.queue.renew([before], lease=3600) == [], "the second one keeps it"
    shell.queue.give_back(other, AttemptOutcome.HANDED_BACK, reason="handed back")
    resume(frozen)
    shell.until(lambda: shell.queue.job(other.id).alive, "it goes on with the other trial")
    after = shell.queue.job(job.id)
    assert dataclasses.replace(after, mirrored=before.mirrored) == before
    assert shell.queue.curve(job.id) == curve
    resume(frozen_too)
    output, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, output
    assert f"trial {job.number} of thawed: worker lost, attempt 2" in output
    output, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, output
    assert f"trial {job.number} of thawed: lost its lease, stopping" in output
    assert f"trial {job.number} of thawed done" not in output
    assert shell.queue.job(job.id).worker == before.worker, "the second one recorded it"
    check_recorded_once(shell, "thawed", points=2, epochs=600)


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_and_keeps_the_newest_checkpoint(shell, data, tmp_path):
    study = cells.study(tmp_path, "twice", data=data, epochs=30_000)
    process = shell.start("run", "--study", study, "--trainers", 2)
    shell.until(lambda: any(job.checkpoint for job in shell.trials("twice")), "a checkpoint")
    begin = clock(process)
    for trainer in trainers(process):
        trainer.suspend()  # none answers: only the second signal ends it before its patience does
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    until_ended(process)
    assert clock(process) - begin < 2.9
    assert process.wait() == 130
    assert {(job.state, job.attempt) for job in shell.trials("twice")} == {("waiting", 0)}
    assert any(job.checkpoint for job in shell.trials("twice"))


@pytest.mark.slow
def test_a_trial_that_kills_its_trainer_three_times_is_dead_and_named_at_closing(shell, data, tmp_path):
    study = cells.study(tmp_path, "deadly", data=data, epochs=200, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 1)
    for attempt, how in ((1, signal.SIGSEGV), (2, signal.SIGABRT), (3, signal.SIGKILL)):
        shell.until(
            lambda attempt=attempt: any(
                job.number == 0 and job.alive and job.attempt == attempt for job in shell.trials("deadly")
            ),
            f"attempt {attempt}",
        )
        trainers(process)[0].send_signal(how)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    reason = "trainer killed by SIGKILL (exit 137, likely out of memory)"
    assert "trial 0 of deadly failed in attempt 1: trainer killed by SIGSEGV (exit 139)" in output
    assert "trial 0 of deadly failed in attempt 2: trainer killed by SIGABRT (exit 134)" in output
    assert f"trial 0 of deadly failed in attempt 3: {reason}" in output
    assert f"Trial 0 is dead: {reason}." in output
    jobs = shell.trials("deadly")
    assert [(job.state, job.attempt) for job in jobs] == [("dead", 3), ("done", 1)]
    with mirrored(shell, "deadly") as shown:
        assert invariants.check(shown) == []
    run = MlflowClient(shell.tracking_uri).get_run(jobs[0].run_id)
    assert (run.info.status, run.data.tags["hpo.reason"]) == ("FAILED", reason)

    shell.hpo("run", "--study", study, "--retry")
    check_recorded_once(shell, "deadly", points=2, epochs=200)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_recorded_once_and_never_promoted(shell, data, tmp_path):
    study = cells.study(tmp_path, "diverging", data=data, epochs=20, rates="[1e-3, 1e15]")
    study.write_text(study.read_text().replace("dropout = 0.2", "dropout = 0.0").replace("[2, 4]", "[4]"))
    output = shell.hpo("run", "--study", study)
    good, job = shell.trials("diverging")
    assert (good.spec.point["learning_rate"], good.state) == (1e-3, "done")
    assert (job.spec.point["learning_rate"], job.state, job.attempt) == (1e15, "diverged", 1)
    epoch = int(job.reason.rpartition(" ")[2])
    assert job.reason == f"diverged at epoch {epoch}"
    assert f"trial {job.number} of diverging diverged at epoch {epoch}" in output
    assert f"Trial {job.number} is diverged: diverged at epoch {epoch}." in output
    client = MlflowClient(shell.tracking_uri)
    curve = client.get_metric_history(job.run_id, "val/nmse")
    assert [point.step for point in curve] == list(range(1, epoch))
    run = client.get_run(job.run_id)
    assert run.info.status == "FAILED"
    models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{job.run_id}'")
    assert models == []
    with mirrored(shell, "diverging") as shown:
        assert invariants.check(shown) == []
    again = shell.hpo("run", "--study", study)
    assert "diverged at epoch" in again and {job.attempt for job in shell.trials("diverging")} == {1}


@pytest.mark.long
def test_a_trainer_without_progress_is_ended_and_its_trial_goes_on_elsewhere(shell, data, tmp_path):
    shell.environment |= {"HPO_HANG_TIMEOUT": "25"}  # packaging a model, too, has to end in this time
    study = cells.study(tmp_path, "hung", data=data, epochs=600, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("hung", epochs=100)
    trainers(process)[0].suspend()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert f"trial {job.number} of hung: no progress for 25 s" in output
    assert f"trial {job.number} of hung: no progress for 25 s, attempt 2" in output
    check_recorded_once(shell, "hung", points=2, epochs=600)
    assert shell.queue.job(job.id).attempt == 2


@pytest.mark.slow
def test_two_promoters_at_once_set_one_alias_on_one_version(shell, tmp_path):
    data = cells.make(tmp_path / "own", seed=9)  # its own: all studies on one data set compete for one champion
    study = cells.study(tmp_path, "promoted", data=data, epochs=60, rates="[1e-2]")
    shell.hpo("run", "--study", study)
    client, name = MlflowClient(shell.tracking_uri), shell.queue.study("promoted").facts.model_name
    aliases = client.get_registered_model(name).aliases
    assert set(aliases) == {"promoted", "champion"}
    for alias in aliases:
        client.delete_registered_model_alias(name, alias)
    both = [shell.start("promote", "--study", "promoted") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert client.get_registered_model(name).aliases == aliases
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert all("@champion is this version" in output for output in outputs)


@pytest.mark.long
def test_a_lapsed_lease_nobody_took_over_makes_the_worker_stop_and_begin_again(shell, data, tmp_path):
    study = cells.study(tmp_path, "lapsed", data=data, epochs=600, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("lapsed", epochs=50)
    with shell.queue.engine.begin() as connection:
        connection.execute(
            text("UPDATE hpo.job SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :id"), {"id": job.id}
        )
    assert shell.queue.expire("lapsed", lease=0) == [job.id], "as another worker's reconciling does"
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert f"trial {job.number} of lapsed: lost its lease, stopping" in output
    assert f"trial {job.number} of lapsed: worker lost, attempt 2" in output
    check_recorded_once(shell, "lapsed", points=2, epochs=600)


@pytest.mark.long
def test_dropped_connections_cost_nothing(shell, data, tmp_path):
    study = cells.study(tmp_path, "dropped", data=data, epochs=400)
    process = shell.start("run", "--study", study, "--trainers", 2)
    shell.training("dropped", epochs=20)
    end = time.monotonic() + PATIENCE
    dropped = 0
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.7)
        with shell.queue.engine.begin() as connection:
            everyone = (
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
            )
            dropped += connection.execute(text(f"{everyone} AND pid <> pg_backend_pid()")).scalar()
        if dropped > 15:
            break
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and dropped > 5, output
    check_recorded_once(shell, "dropped", points=4, epochs=400)
    assert {job.attempt for job in shell.trials("dropped")} == {1}


@pytest.mark.long
def test_a_trial_that_moves_to_another_kind_of_machine_is_of_one_network(shell, data, tmp_path):
    """Its patience ends at another epoch there, and the models are not equal to the bit."""
    file, marker = cells.study(tmp_path, "rounded", data=data, epochs=300, rates="[1e-2]"), tmp_path / "died"
    file.write_text(file.read_text().replace("[2, 4]", "[4]") + "patience = 8\n")
    shell.environment |= {"HPO_LEASE": "2", "HPO_CHECKPOINT_INTERVAL": "1000", "HPO_CRASH_AT": f"model logged:{marker}"}
    output, _ = shell.start("run", "--study", file).communicate(timeout=PATIENCE)
    assert marker.exists(), f"the step was never reached: {output}"
    (first,) = shell.trials("rounded")
    curve = shell.queue.curve(first.id)

    shell.environment |= {"ATEN_CPU_CAPABILITY": "default"}  # rounds as a CPU without AVX2 does
    output = shell.hpo("run", "--study", file)
    (job,) = shell.trials("rounded")
    check_recorded_once(shell, "rounded", points=1, epochs=job.result.epochs)
    scores = dict(shell.queue.curve(job.id))
    best, last = scores[job.result.best_epoch], scores[job.result.epochs]
    for name, metrics in (("best", best), ("last", last)):
        found = {score: getattr(job.result, f"{name}_val_{score}") for score in ("nmse", "mse")}
        assert found == {score: metrics[f"val/{score}"] for score in ("nmse", "mse")}
    assert job.result.validation.mse == pytest.approx(best["val/mse"], rel=1e-4), "of the weights handed out"
    assert job.result.last_validation.mse == pytest.approx(last["val/mse"], rel=1e-4)
    if curve[0][1]["val/nmse"] != scores[1]["val/nmse"]:  # else this CPU has one kind of rounding alone
        assert "comes out otherwise here: its curve is cut back to epoch 0" in output
        assert job.run_id != first.run_id
    assert "Healthy" in shell.hpo("doctor", "--study", "rounded")
