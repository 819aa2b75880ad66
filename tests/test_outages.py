"""Services that go away under a running worker: training goes on, everything arrives once, the message says what."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cells
import psutil
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, Shell, check_recorded_once, mlflow_processes, postgres_processes

from hpo import home as homes
from hpo import mlflow_server, services, settings

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, settings.Settings]]:
    """`hpo` on services of this test's own, which it may stop, freeze and kill."""
    read = settings.read({"HPO_HOME": str(tmp_path_factory.mktemp("outage") / "home")})
    try:
        found, _ = services.up(read, report=lambda line: None)
        shell = Shell(read.home, found.database_url, found.tracking_uri)
        for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
            del shell.environment[name]
        try:
            yield shell, read
        finally:
            shell.close()
    finally:
        for process in postgres_processes(read):
            with suppress(psutil.Error):  # it has just ended
                process.resume()
        services.erase(read)


def home(read: settings.Settings) -> homes.Home:
    found = homes.read(read.home.resolve())
    assert found is not None
    return found


def restart_postgres(read: settings.Settings, how: signal.Signals, *, away: float) -> None:
    postmaster = postgres_processes(read)[0]
    postmaster.send_signal(how)
    psutil.wait_procs([postmaster], timeout=30)
    time.sleep(away)
    services.up(read, report=lambda line: None)


def output_of(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_trials_go_on_and_keep_their_lease_when_postgres_is_restarted(own, data, tmp_path, how):
    shell, read = own
    study = cells.study(tmp_path, "restarted", data=data, epochs=400)
    process = shell.start("run", "--study", study, "--trainers", 2)
    shell.training("restarted", epochs=50)
    restart_postgres(read, how, away=10)  # longer than the lease, which nobody could renew
    output = output_of(process)
    assert "database lost, retrying" in output and "all services answer again" in output
    assert {job.attempt for job in shell.trials("restarted")} == {1}
    check_recorded_once(shell, "restarted", points=4, epochs=400)


def test_training_goes_on_without_mlflow_and_everything_arrives_once(own, data, tmp_path):
    shell, read = own
    shell.environment |= {"HPO_OUTAGE_LIMIT": "1"}
    study = cells.study(tmp_path, "unseen", data=data, epochs=3000)  # which takes longer than the limit
    process = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("unseen", epochs=50)
    mlflow_server.stop(home(read))
    away = time.monotonic()
    shell.until(lambda: shell.queue.job(job.id).epochs == 3000, "training goes on to the last epoch")
    packaged = f"work/*/job-{job.id}-*/model/README.md"  # from then on the trainer is free for another trial
    shell.until(lambda: list(read.home.glob(packaged)), "the model is packaged")
    time.sleep(max(4.0, away + 6 - time.monotonic()))
    assert sum(each.attempt for each in shell.trials("unseen")) == 1, "no other trial is claimed"
    assert not any(each.state == "done" for each in shell.trials("unseen")), "what has no model is not done"
    services.up(read, report=lambda line: None)
    output = output_of(process)
    assert "MLflow unreachable, " in output and " epochs waiting" in output
    check_recorded_once(shell, "unseen", points=4, epochs=3000)
    assert {each.attempt for each in shell.trials("unseen")} == {1}
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name("unseen").experiment_id
    assert len(client.search_runs([experiment], run_view_type=3)) == 4 + 2 + 1, "no ghost run, not even a deleted one"


def test_sigterm_in_the_middle_of_an_mlflow_retry_gives_back_within_eight_seconds(own, data, tmp_path):
    shell, read = own
    process = shell.start("run", "--study", cells.study(tmp_path, "termed", data=data, epochs=3000), "--trainers", 2)
    shell.training("termed", epochs=100)
    for each in mlflow_processes(read):
        each.suspend()  # worse than a dead one: it takes connections and says nothing
    time.sleep(2)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = output_of(process, code=130)
    assert time.monotonic() - begin < 8
    assert "Stopped: what is done is kept." in output
    assert {(job.state, job.attempt) for job in shell.trials("termed")} == {("waiting", 0)}


def test_sigterm_ends_the_worker_in_time_though_the_database_is_frozen(own, data, tmp_path):
    shell, read = own
    process = shell.start("run", "--study", cells.study(tmp_path, "frozen", data=data, epochs=3000), "--trainers", 2)
    shell.training("frozen", epochs=50)
    trainers = psutil.Process(process.pid).children()
    for each in postgres_processes(read):
        each.suspend()
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    assert time.monotonic() - begin < 8
    assert psutil.wait_procs(trainers, timeout=5)[1] == []


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """The folder as a small file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "hpo-test", folder]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def artifacts(own) -> Iterator[Path]:
    """The artifact store of `own` as a small file system of its own."""
    with tmpfs(own[1].home / "artifacts", "8m") as folder:
        yield folder


@pytest.mark.root
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_full_or_read_only_store_is_said_and_nothing_is_claimed_until_it_takes_files(
    own, artifacts, data, tmp_path, what
):
    shell, _ = own
    study = cells.study(tmp_path, "crowded", data=data, epochs=1000)  # long enough for a checkpoint
    process = shell.start("run", "--study", study, "--trainers", 1)
    job = shell.training("crowded", epochs=50)
    if what == "full":
        fill = ["dd", "if=/dev/zero", f"of={artifacts / 'junk'}", "bs=4k", "oflag=append", "conv=notrunc"]
        while shutil.disk_usage(artifacts).free:  # a checkpoint that is deleted meanwhile makes room again
            subprocess.run(fill, capture_output=True)
    else:
        subprocess.run(["mount", "-o", "remount,ro", artifacts], check=True)
    shell.until(lambda: shell.queue.job(job.id).epochs == 1000, "training goes on")
    time.sleep(6)
    assert not any(each.state == "done" for each in shell.trials("crowded"))
    assert sum(each.attempt for each in shell.trials("crowded")) == 1, "no other trial is claimed"
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name("crowded").experiment_id
    assert all(str(model.status) != "READY" for model in client.search_logged_models([experiment]))
    if what == "full":
        (artifacts / "junk").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", artifacts], check=True)
    output = output_of(process)
    assert f"store {what}: " in output and " MB needed" in output
    check_recorded_once(shell, "crowded", points=4, epochs=1000)
    assert {each.attempt for each in shell.trials("crowded")} == {1}


@pytest.mark.root
@pytest.mark.parametrize(("what", "interval"), [("checkpoint", "0"), ("model", "60")])
def test_a_trainer_that_finds_the_disk_full_gives_back_and_no_attempt_is_counted(shell, data, tmp_path, what, interval):
    shell.environment |= {"HPO_CHECKPOINT_INTERVAL": interval}
    study = cells.study(tmp_path, f"tight-{what}", data=data, epochs=50)
    study.write_text(study.read_text().replace("[1e-3, 1e-4]", "[1e-3]"))
    with tmpfs(shell.home / "work", "80k") as folder:  # half of what either needs; of the model it is the .pt2 file
        process = shell.start("run", "--study", study, "--trainers", 1)
        shell.until(
            lambda: any("no room on the disk" in (each.reason or "") for each in shell.trials(study.stem)), "no room"
        )
        assert {each.attempt for each in shell.trials(study.stem)} == {0}
        subprocess.run(["mount", "-o", "remount,size=128m", folder], check=True)
        output = output_of(process)
    assert "no room on the disk" in output
    check_recorded_once(shell, study.stem, points=2, epochs=50)
    assert {each.attempt for each in shell.trials(study.stem)} == {1}
