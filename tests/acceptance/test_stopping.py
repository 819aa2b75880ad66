"""`hpo stop`, `hpo cancel` and `hpo status`, on real workers: by the queue, so on whatever host they are."""

import re

import cells
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState
from shell import PATIENCE, family, mirrored, resume, suspend, trainers

from hpo.operations import invariants

pytestmark = pytest.mark.acceptance


@pytest.mark.slow
def test_stop_ends_running_idle_and_frozen_workers_and_those_that_join_later_go_on(shell, data, tmp_path):
    study = cells.study(tmp_path, "halted", data=data, epochs=30_000)
    study.write_text(study.read_text().replace("[1e-3, 1e-4]", "[1e-2]"))  # two points: the third worker is idle
    run = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("halted", epochs=20)
    frozen = shell.start("worker", "--study", "halted", "--trainers", 1)
    other = shell.until(
        lambda: next((each for each in shell.trials("halted") if each.alive and each.id != job.id), None),
        "the second worker has the other trial",
    )
    shell.until(lambda: shell.queue.job(other.id).epochs, "and trains it")
    idle = shell.start("worker", "--study", "halted", "--trainers", 1)
    shell.until(lambda: len(shell.queue.workers("halted")) == 3, "the idle worker is here")

    (seen,) = shell.json("status")["open"]
    assert [(each["alive"], each["trainers"], len(each["trials"])) for each in seen["workers"]] == [
        (True, 1, 1),
        (True, 1, 1),
        (True, 1, 0),
    ]
    trial = seen["workers"][0]["trials"][0]
    assert trial["number"] == job.number and 20 <= trial["epoch"] < trial["epochs"] == 30_000
    left = (30_000 - trial["epoch"]) / trial["epochs_per_second"]
    assert trial["seconds_left"] == pytest.approx(left) and seen["workers"][0]["host"]
    shown = dict(re.findall(r"^ *(\d+) .* epoch (\d+)/30000 ", shell.hpo("status"), re.MULTILINE))
    assert int(shown[str(trial["config"])]) >= trial["epoch"], "by its place in the grid; it has gone on meanwhile"

    asleep = family(frozen)
    suspend(asleep)
    stop = shell.start("stop", "--study", "halted")
    for process in (idle, run):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        assert "Stopped by " in output and "(hpo stop): what is done is kept. The same command goes on." in output
    output, _ = stop.communicate(timeout=PATIENCE)
    assert stop.returncode == 0, output
    assert "(idle)" in output and "Nobody works on halted; 0 of 2 trials are done." in output
    kept = {each.id: each for each in shell.trials("halted")}
    assert (kept[job.id].state, kept[job.id].attempt) == ("waiting", 0)
    assert (kept[other.id].state, kept[other.id].attempt) == ("waiting", 1), "its lease ran out"

    resume(asleep)
    output, _ = frozen.communicate(timeout=PATIENCE)
    assert frozen.returncode == 0 and "Stopped by " in output, output

    later = shell.start("worker", "--study", "halted", "--trainers", 1)
    shell.until(lambda: any(each.alive for each in shell.trials("halted")), "who joins later works")
    assert "leave within seconds" in shell.hpo("stop", "--study", "halted", "--no-wait")
    output, _ = later.communicate(timeout=PATIENCE)
    assert later.returncode == 0, output


@pytest.mark.long
def test_a_cancelled_trial_is_recorded_once_and_trained_only_if_brought_back(shell, data, tmp_path):
    study = cells.study(tmp_path, "thinned", data=data, epochs=250)
    run = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("thinned", epochs=20)
    suspend(trainers(run))  # it is not done before it is cancelled
    words = ("cancel", "--study", "thinned", "--trial")
    assert f"Cancelled trial {job.number} of thinned after epoch " in shell.hpo(*words, job.number)
    waiting = next(each for each in shell.trials("thinned") if each.state == "waiting")
    shell.hpo(*words, f"{waiting.number}/0")
    shell.until(lambda: any(each.alive and each.id != job.id for each in shell.trials("thinned")), "the worker goes on")
    assert f"trial {job.number} of thinned is cancelled" in shell.hpo(*words, job.number, code=1)
    assert "has no trial '9'" in shell.hpo(*words, 9, code=1)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    assert f"trial {job.number} of thinned: cancelled by " in output and "stopping" in output
    numbers = ", ".join(map(str, sorted((job.number, waiting.number))))
    assert f"2 trials are cancelled ({numbers}): cancelled by " in output, "the closed study names both"
    jobs = {each.id: each for each in shell.trials("thinned")}
    client, ended = MlflowClient(shell.tracking_uri), [jobs[job.id], jobs[waiting.id]]
    assert [each.state for each in ended] == ["cancelled", "cancelled"]
    done = [each for each in jobs.values() if each.state == "done"]
    assert len(done) == 2
    with mirrored(shell, "thinned") as shown:
        assert invariants.check(shown) == []
        trials = shown.store.get_all_trials(shown.store.get_study_id_from_name("thinned"))
        assert [trials[each.number].state for each in ended] == [TrialState.FAIL] * 2
    for each in ended:
        assert client.get_run(each.run_id).info.status == "KILLED"
    curve = client.get_metric_history(ended[0].run_id, "val/nmse")
    assert [point.step for point in curve] == list(range(1, ended[0].epochs + 1)) and len(curve) >= 20
    refused = shell.hpo(*words, done[0].number, code=1)
    assert f"trial {done[0].number} of thinned is done. Only one that has not ended can be cancelled." in refused
    again = shell.hpo("run", "--study", study, "--retry")
    assert f"2 trials are cancelled ({numbers})" in again, "they are not retried"

    assert "waits again after epoch" in shell.hpo(*words, job.number, "--undo")
    shell.hpo("run", "--study", study, "--trainers", 1)
    assert shell.queue.job(job.id).state == "done"
    with mirrored(shell, "thinned") as shown:
        assert invariants.check(shown) == []
    assert "Healthy" in shell.hpo("doctor")


@pytest.mark.long
def test_a_slot_whose_point_is_not_chosen_yet_can_be_cancelled_and_brought_back(shell, data, tmp_path):
    study = cells.study(tmp_path, "slots", data=data, epochs=5)
    text = study.read_text().replace("[1e-3, 1e-4]", "{low = 1e-4, high = 1e-2, log = true}")
    study.write_text(text.replace("[space]", '[sampler]\nname = "random"\ntrials = 3\n[space]'))
    run = shell.start("run", "--study", study, "--trainers", 1)
    shell.until(lambda: any(row.facts.planned for row in shell.queue.studies()), "it is planned")
    run.kill()
    run.communicate(timeout=PATIENCE)
    slot = next(each for each in reversed(shell.trials("slots")) if each.spec is None)
    shell.hpo("cancel", "--study", "slots", "--trial", slot.number)
    with mirrored(shell, "slots") as shown:
        assert invariants.check(shown) == []
        number = shown.store.get_study_id_from_name("slots")
        assert shown.store.get_all_trials(number)[slot.number].state == TrialState.FAIL
    shell.hpo("cancel", "--study", "slots", "--trial", slot.number, "--undo")
    assert shell.queue.job(slot.id).state == "waiting"
    with mirrored(shell, "slots") as shown:
        assert invariants.check(shown) == []
