"""Services that go away under a running worker: training goes on, everything arrives once, the message says what."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cells
import psutil
import pytest
from mlflow import MlflowClient
from shell import (
    PATIENCE,
    Shell,
    check_recorded_once,
    clock,
    mlflow_processes,
    postgres_processes,
    resume,
    suspend,
    tmpfs,
    until_ended,
)

from hpo import settings
from hpo.queue import Job
from hpo.services import home as homes
from hpo.services import mlflow_server, serving

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Iterator[settings.Settings]:
    """Settings of services of this file's own, which are erased after it."""
    read = settings.read({"HPO_HOME": str(tmp_path_factory.mktemp("outage") / "home")})
    yield read
    serving.erase(read)


@pytest.fixture
def own(erased: settings.Settings) -> Iterator[tuple[Shell, settings.Settings]]:
    """`hpo` on services that run and that a test may stop, freeze and kill."""
    found, _ = serving.up(erased, report=lambda line: None)
    shell = Shell(erased.home, found.database_url, found.tracking_uri)
    for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        del shell.environment[name]
    try:
        yield shell, erased
    finally:
        resume([*postgres_processes(erased), *mlflow_processes(erased)])
        shell.close()


def home(read: settings.Settings) -> homes.Home:
    found = homes.read(read.home.resolve())
    assert found is not None
    return found


def restart_postgres(read: settings.Settings, how: signal.Signals, *, away: float) -> None:
    postmaster = postgres_processes(read)[0]
    postmaster.send_signal(how)
    psutil.wait_procs([postmaster], timeout=30)
    time.sleep(away)
    serving.up(read, report=lambda line: None)


def output_of(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


def until_packaged(shell: Shell, job: Job) -> None:
    """Wait until the trial's model lies in its work folder: then its trainer is free for another trial."""
    shell.until(lambda: list(shell.home.glob(f"work/*/job-{job.id}-*/model/README.md")), "the model is packaged")


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGINT, id="fast"), pytest.param(signal.SIGQUIT, id="immediate")],
)
def test_trials_go_on_and_keep_their_lease_when_postgres_is_restarted(own, data, tmp_path, how):
    shell, read = own
    name = f"restarted-{how.name.lower()}"
    study = cells.study(tmp_path, name, data=data, epochs=400, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 2)
    shell.training(name, epochs=50)
    restart_postgres(read, how, away=10)  # longer than the lease, which nobody could renew
    output = output_of(process)
    assert "database lost, retrying" in output and "all services answer again" in output
    assert {job.attempt for job in shell.trials(name)} == {1}
    check_recorded_once(shell, name, points=2, epochs=400)


def test_training_goes_on_without_mlflow_and_everything_arrives_once(own, data, tmp_path):
    shell, read = own
    shell.environment |= {"HPO_OUTAGE_LIMIT": "0.2"}
    study = cells.study(tmp_path, "unseen", data=data, epochs=1000, rates="[1e-3]")
    process = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("unseen", epochs=50)
    mlflow_server.stop(home(read))
    shell.until(lambda: shell.queue.job(job.id).epochs == 1000, "training goes on to the last epoch")
    until_packaged(shell, job)
    time.sleep(3)
    assert sum(each.attempt for each in shell.trials("unseen")) == 1, "no other trial is claimed"
    assert not any(each.state == "done" for each in shell.trials("unseen")), "what has no model is not done"
    serving.up(read, report=lambda line: None)
    output = output_of(process)
    assert "MLflow unreachable, " in output and " epochs waiting" in output
    check_recorded_once(shell, "unseen", points=2, epochs=1000)
    assert {each.attempt for each in shell.trials("unseen")} == {1}
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name("unseen").experiment_id
    assert len(client.search_runs([experiment], run_view_type=3)) == 2 + 2 + 1, "no ghost run, not even a deleted one"


@pytest.mark.long
def test_sigterm_in_the_middle_of_an_mlflow_retry_gives_back_within_eight_seconds(own, data, tmp_path):
    shell, read = own
    process = shell.start("run", "--study", cells.study(tmp_path, "termed", data=data, epochs=30_000), "--trainers", 2)
    shell.training("termed", epochs=100)
    suspend(mlflow_processes(read))  # worse than a dead one: it takes connections and says nothing
    time.sleep(2)
    begin = clock(process)
    process.send_signal(signal.SIGTERM)
    until_ended(process)
    assert clock(process) - begin < 8
    output = output_of(process, code=130)
    assert "Stopped: what is done is kept." in output
    assert {(job.state, job.attempt) for job in shell.trials("termed")} == {("waiting", 0)}


@pytest.mark.long
def test_a_trial_is_cancelled_and_brought_back_though_mlflow_is_frozen(own, data, tmp_path):
    shell, read = own
    shell.start("run", "--study", cells.study(tmp_path, "held", data=data, epochs=30_000), "--trainers", 1)
    words = ("--study", "held", "--trial", shell.training("held", epochs=20).number)
    suspend(mlflow_processes(read))
    for undo, says in (((), "Cancelled trial"), (("--undo",), "waits again")):
        output = shell.hpo("cancel", *words, *undo)
        assert says in output and "MLflow is away: a worker shows it there later." in output
    assert "Trials of held" in shell.hpo("trials", "--study", "held")
    assert "does not answer, its Postgres does" in shell.hpo("promote", "--study", "held", code=1)


def test_sigterm_ends_the_worker_in_time_though_the_database_is_frozen(own, data, tmp_path):
    shell, read = own
    process = shell.start("run", "--study", cells.study(tmp_path, "frozen", data=data, epochs=30_000), "--trainers", 2)
    shell.training("frozen", epochs=50)
    trainers = psutil.Process(process.pid).children()
    suspend(postgres_processes(read))
    time.sleep(1)
    begin = clock(process)
    process.send_signal(signal.SIGTERM)
    until_ended(process)
    assert clock(process) - begin < 8
    assert psutil.wait_procs(trainers, timeout=30)[1] == []


def read_only(folder: Path) -> bool:
    """Make a file system read-only; false while that is refused, because a file is being written there."""
    return subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True).returncode == 0


@pytest.mark.long
@pytest.mark.root
def test_nothing_is_claimed_while_the_store_is_full_or_read_only_and_that_is_said(own, tmp_path):
    shell, read = own
    data = cells.make(tmp_path / "cells", seed=4)  # its own: the file system that its models lie on goes away
    study = cells.study(tmp_path, "crowded", data=data, epochs=1000, rates="[1e-3]")  # long enough for a checkpoint
    study.write_text(study.read_text().replace("[2, 4]", "[2, 3, 4]"))
    client = MlflowClient(shell.tracking_uri)
    with tmpfs(read.home / "artifacts", "8m") as artifacts:
        process = shell.start("run", "--study", study, "--trainers", 1)
        for done, what in enumerate(("full", "read-only")):
            job = shell.training("crowded", epochs=50)
            if what == "full":
                fill = ["dd", "if=/dev/zero", f"of={artifacts / 'junk'}", "bs=4k", "oflag=append", "conv=notrunc"]
                while shutil.disk_usage(artifacts).free:  # a checkpoint that is deleted meanwhile makes room again
                    subprocess.run(fill, capture_output=True)
            else:
                shell.until(partial(read_only, artifacts), "it is read-only")
            shell.until(lambda job=job: shell.queue.job(job.id).epochs == 1000, "training goes on")
            until_packaged(shell, job)
            time.sleep(3)
            assert sum(each.state == "done" for each in shell.trials("crowded")) == done
            assert sum(each.attempt for each in shell.trials("crowded")) == done + 1, "no other trial is claimed"
            experiment = client.get_experiment_by_name("crowded").experiment_id
            models = client.search_logged_models([experiment])
            assert sum(str(model.status) == "READY" for model in models) == done
            if what == "full":
                (artifacts / "junk").unlink()
            else:
                subprocess.run(["mount", "-o", "remount,rw", artifacts], check=True)
            shell.until(lambda job=job: shell.queue.job(job.id).state == "done", "it is recorded")
        output = output_of(process)
        assert "store full: " in output and "store read-only: " in output and " MB needed" in output
        check_recorded_once(shell, "crowded", points=3, epochs=1000)
        assert {each.attempt for each in shell.trials("crowded")} == {1}


@pytest.mark.long
@pytest.mark.root
@pytest.mark.parametrize(("what", "interval"), [("checkpoint", "0"), ("model", "60")])
def test_a_trainer_that_finds_the_disk_full_gives_back_and_no_attempt_is_counted(shell, data, tmp_path, what, interval):
    shell.environment |= {"HPO_CHECKPOINT_INTERVAL": interval}
    study = cells.study(tmp_path, f"tight-{what}", data=data, epochs=600, rates="[1e-3]")
    with tmpfs(shell.home / "work", "128m") as folder:
        process = shell.start("run", "--study", study, "--trainers", 1)
        shell.training(study.stem, epochs=1)
        # Half of what either needs; of the model it is the .pt2 file.
        shrink = ["mount", "-o", "remount,size=80k", folder]  # refused while a checkpoint is there
        shell.until(lambda: subprocess.run(shrink, capture_output=True).returncode == 0, "the disk is smaller")
        shell.until(
            lambda: any("no room on the disk" in (each.reason or "") for each in shell.trials(study.stem)), "no room"
        )
        assert {each.attempt for each in shell.trials(study.stem)} == {0}
        subprocess.run(["mount", "-o", "remount,size=128m", folder], check=True)
        output = output_of(process)
    assert "no room on the disk" in output
    check_recorded_once(shell, study.stem, points=2, epochs=600)
    assert {each.attempt for each in shell.trials(study.stem)} == {1}
