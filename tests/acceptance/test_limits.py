"""A worker that leaves before its study is closed, and which GPU a trainer gets."""

import zipfile
from dataclasses import replace

import cells
import pytest
import records

from data_pipeline.cores import cores
from hpo import settings, study
from hpo.cli import main, studies
from hpo.errors import ServiceError, SettingsError
from hpo.files import sha256_of
from hpo.operations import compute, work
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.recording.outcomes import DataFetched, NothingRecorded
from hpo.recording.reconciler import Reconciler
from hpo.recording.tasks import Tasks
from hpo.tracking import data_sets
from hpo.tracking.client import Tracker
from hpo.worker import ending
from hpo.worker.devices import Place
from hpo.worker.ending import OUT_OF_TIME, Limits
from hpo.worker.processes import next_gpu, visible_gpus
from hpo.worker.supervisor import Supervisor
from hpo.worker.worker import Worker


def plan(shell, folder, name, *, data, epochs):
    ready = prepare(study.load(str(cells.study(folder, name, data=data, epochs=epochs))))
    shell.queue.install()
    read = settings.read(shell.environment)
    plans.plan(ready, shell.queue, Tracker(shell.tracking_uri), read, shell.database_url)
    return read


@pytest.mark.acceptance
def test_a_worker_leaves_after_its_trials_and_when_it_is_idle(shell, data, tmp_path):
    plan(shell, tmp_path, "short", data=data, epochs=3)
    output = shell.hpo("worker", "--study", "short", "--max-trials", 3, "--trainers", 1)
    assert "Left at its limit: study short is not closed yet." in output
    states = sorted(job.state for job in shell.trials("short"))
    assert states == ["done", "done", "done", "waiting"]

    last = shell.queue.claim("short", worker="another", lease=600)
    assert last is not None
    output = shell.hpo("worker", "--study", "short", "--idle-exit", 1, "--trainers", 1)
    assert "Left at its limit" in output and "claimed" not in output
    assert shell.queue.require(last).worker == "another"


@pytest.mark.service
def test_a_worker_whose_time_is_over_hands_back(shell, data, tmp_path, monkeypatch):
    read = plan(shell, tmp_path, "long", data=data, epochs=100_000)
    monkeypatch.setattr(ending, "STOP_GRACE", 60.0)  # the trainer gets its time on a busy machine, too
    monkeypatch.setattr(ending, "STOP_LIMIT", 120.0)
    worker = Worker(read, shell.database_url, shell.tracking_uri, "long", trainers=1)

    def when_training(supervisor: Supervisor) -> None:
        if any(job.epochs for job in shell.trials("long")):
            supervisor.claims.limits = Limits(seconds=0)
        if supervisor.ending.reason is not None:
            supervisor.ending.stop("SIGTERM")  # SLURM's, which sends two

    assert worker.run(limits=Limits(seconds=600), on_tick=when_training) is False
    assert worker.ending.reason == OUT_OF_TIME and not worker.ending.hurry
    (begun,) = [job for job in shell.trials("long") if job.epochs]
    assert (begun.state, begun.attempt, begun.reason) == ("waiting", 0, "handed back")
    assert begun.checkpoint.epoch == begun.epochs


@pytest.mark.service
def test_a_worker_that_ends_for_an_error_asks_its_trainers_for_their_state_first(shell, data, tmp_path, monkeypatch):
    read = plan(shell, tmp_path, "refused", data=data, epochs=100_000)
    monkeypatch.setattr(ending, "STOP_GRACE", 60.0)
    monkeypatch.setattr(ending, "STOP_LIMIT", 120.0)
    worker = Worker(read, shell.database_url, shell.tracking_uri, "refused", trainers=1)

    def when_training(supervisor: Supervisor) -> None:
        if any(job.epochs for job in shell.trials("refused")):
            supervisor._inbox.post(NothingRecorded(study="refused", reason="trial 0 of refused: odd"))

    with pytest.raises(ServiceError, match=r"No result can be recorded any more\. trial 0 of refused: odd"):
        worker.run(on_tick=when_training)
    (begun,) = [job for job in shell.trials("refused") if job.epochs]
    assert (begun.state, begun.attempt, begun.reason) == ("waiting", 0, "handed back")
    assert begun.checkpoint.epoch == begun.epochs


@pytest.mark.service
def test_a_running_worker_takes_a_data_file_that_doctor_wrote_anew(shell, data, tmp_path):
    read = plan(shell, tmp_path, "renewed", data=data, epochs=3)
    worker = Worker(read, shell.database_url, shell.tracking_uri, "renewed", trainers=1)
    old = data_sets.cached(read.home, worker.row.facts.data.digest, worker.row.facts.data.sha256)
    with zipfile.ZipFile(old) as packed, zipfile.ZipFile(tmp_path / "other.npz", "w", zipfile.ZIP_STORED) as stored:
        for name in packed.namelist():  # the same arrays in other bytes, as another zlib writes them
            stored.writestr(name, packed.read(name))
    other = replace(worker.row.facts.data, sha256=sha256_of(tmp_path / "other.npz"))
    new = data_sets.cached(read.home, other.digest, other.sha256)
    (tmp_path / "other.npz").replace(new)
    data_sets.upload(worker.tracker, worker.row.facts.study_run_id, new)
    worker.queue.amend_facts("renewed", {"data": other.to_json()})
    new.unlink()
    old.write_bytes(b"damaged")
    outcome = Tasks(Reconciler(worker.queue, worker.tracker, worker._store, worker.row), None, read.home).fetch_data()
    assert isinstance(outcome, DataFetched)
    assert outcome.path == new and sha256_of(new) == other.sha256
    worker.close()


@pytest.mark.long
@pytest.mark.service
def test_a_worker_asked_for_before_a_stop_leaves_at_once_though_it_starts_after_it(shell, data, tmp_path):
    plan(shell, tmp_path, "late", data=data, epochs=3)
    stops = shell.queue.study("late").stops
    shell.queue.stop("late", by="ann@lab")
    output = shell.hpo("worker", "--study", "late", "--stops", stops)
    assert "Stopped by ann@lab at " in output and "(hpo stop)" in output
    assert {job.attempt for job in shell.trials("late")} == {0} and shell.queue.workers("late") == []
    output = shell.hpo("worker", "--study", "late", "--stops", stops + 1, "--once", "--trainers", 1)
    assert "Left at its limit" in output and sum(job.state == "done" for job in shell.trials("late")) == 1


@pytest.mark.long
@pytest.mark.service
def test_a_study_whose_planner_died_is_awaited_within_limits_and_can_be_deleted(shell):
    shell.queue.install()
    facts = records.facts(experiment_id=str(2**31 - 1), model_name="nothing-of-it")  # no server has it, nor ever had
    shell.queue.put_study(records.study_row("half", "0" * 64, facts=facts))
    for limit in ("--idle-exit", "--max-hours"):
        output = shell.hpo("worker", "--study", "half", limit, 0)
        assert "Left at its limit: study half is not planned yet." in output
    assert "half is not planned to its end: `hpo run --study half` goes on with it" in shell.hpo(
        "promote", "--study", "half", code=1
    )
    output = shell.hpo("delete", "--study", "half", "--yes", code=1)
    assert "is it the server you mean?" in output and [row.name for row in shell.queue.studies()] == ["half"]
    assert "Deleted the study half." in shell.hpo("delete", "--study", "half", "--yes", "--not-in-mlflow")
    assert shell.queue.studies() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-trials", "0"], "--max-trials: expected at least 1, found 0"),
        (["--max-hours", "nan"], "--max-hours: expected at least 0, found nan"),
        (["--idle-exit", "-1"], "--idle-exit: expected at least 0, found -1"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        options = main.parser().parse_args(["worker", "--study", "grid", *words])
        work.limits_of(max_trials=options.max_trials, max_hours=options.max_hours, idle_exit=options.idle_exit)


def trainers(*words: str, threads: int = 1, gpus: tuple[str, ...] = ()) -> int:
    options = main.parser().parse_args(["worker", "--study", "grid", *words])
    return studies.compute(options).count(settings.read({}), threads, Place(device=options.device, gpus=gpus))


def test_trainers_of_several_threads_are_as_many_as_the_cores_have_room_for(monkeypatch):
    monkeypatch.setattr(compute, "cores", lambda: 8)
    assert [trainers(threads=threads) for threads in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    assert trainers("--trainers", "5", threads=4) == 5


def test_there_is_one_trainer_on_each_gpu_unless_told_otherwise():
    three = ("0", "1", "2")
    assert trainers(gpus=three) == 3
    assert trainers("--device", "cuda", "--trainers-per-gpu", "2", gpus=three) == 6
    assert trainers("--device", "cuda", "--trainers", "4", gpus=three) == 4
    assert trainers("--trainers-per-gpu", "2") == cores()
    with pytest.raises(SettingsError, match="expected --device auto"):
        trainers("--device", "cpu", "--trainers-per-gpu", "2")


def test_the_visible_gpus_are_those_of_the_environment_or_all_that_have_a_device(tmp_path):
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1f, 3"}, tmp_path) == ["GPU-1f", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,-1,0"}, tmp_path) == ["2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_trainers_are_spread_over_gpus_and_one_that_died_is_replaced_on_its_own():
    taken: list[str | None] = []
    for _ in range(5):
        taken.append(next_gpu(["0", "1"], taken))
    assert taken == ["0", "1", "0", "1", "0"]
    taken.remove("1")
    assert next_gpu(["0", "1"], taken) == "1"
    assert next_gpu([], []) is None
