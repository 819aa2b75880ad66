"""The `hpo` command as a test runs it: real processes with the settings of one test."""

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import optuna
import psutil
import psycopg
import pytest
from mlflow import MlflowClient
from psycopg import sql

from hpo.cli.main import Messages, main
from hpo.cli.terminal import Output
from hpo.operations import invariants
from hpo.queue import Queue
from hpo.recording.reconciler import Reconciler
from hpo.search.sampling import storage
from hpo.services import home as homes
from hpo.services import mlflow_server
from hpo.services.serving import Services
from hpo.settings import Settings
from hpo.tracking.client import Tracker

PATIENCE = 480.0  # seconds for something that takes a few on an idle machine
# Commands that start services, or stay: each has a process of its own in any test.
STAYING = ("backup", "down", "restore", "up", "worker")


class Shell:
    """Runs `hpo` with the settings of one test, and ends what is left of it."""

    PROGRAM = (sys.executable, "-m", "hpo")

    def __init__(self, home: Path, database_url: str, tracking_uri: str) -> None:
        self.environment = os.environ | {
            "HPO_HOME": str(home),
            "HPO_DATABASE_URL": database_url,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "HPO_LEASE": "8",
            "HPO_CHECKPOINT_INTERVAL": "1",
            "HPO_TRAINERS": "1",  # the tests beside this one take the other cores; a second one costs torch's import
        }
        self._usual = dict(self.environment)
        self.is_inside = True  # whether commands that end by themselves run in the process of the test
        self.home, self.tracking_uri, self.database_url = home, tracking_uri, database_url
        self.started: list[subprocess.Popen] = []
        self.queue = Queue(database_url)

    def start(self, *words: object, before: Sequence[str] = (), stdin: int | None = None) -> subprocess.Popen:
        """Start `hpo WORDS`, with the words of `before` in front of the command."""
        process = subprocess.Popen(
            [*before, *self.PROGRAM, *map(str, words)],
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def hpo(self, *words: object, code: int = 0) -> str:
        """Return what a command prints. Most run in this process: their own would be busy with imports."""
        is_alone = threading.current_thread() is threading.main_thread()  # others share its standard output
        if words[0] not in STAYING and self.is_inside and is_alone and self.environment == self._usual:
            found, output = inside(words, self.environment)
        else:
            process = self.start(*words)
            output, _ = process.communicate(timeout=PATIENCE)
            found = process.returncode
        assert found == code, output
        assert "Traceback" not in output, output
        return output

    def json(self, *words: object):
        return json.loads(self.hpo(*words, "--json"))

    def until(self, condition, what: str):
        """Wait for something that a process we started does; return it."""
        end = time.monotonic() + PATIENCE
        ended = False
        while time.monotonic() < end and not ended:
            ended = all(process.poll() is not None for process in self.started)
            if self.queue.installed() and (found := condition()):
                return found
            time.sleep(0.05)
        last = self.started[-1].communicate()[0] if ended else f"{PATIENCE:.0f} s are over"
        raise AssertionError(f"{what}: not seen. {last}")

    def trials(self, study: str):
        return [job for job in self.queue.jobs(study) if job.kind == "trial"]

    def training(self, study: str, epochs: int = 20):
        """Wait until a trial is in the middle of its training; return it."""
        return self.until(
            lambda: next((job for job in self.trials(study) if job.alive and job.epochs >= epochs), None),
            "a trial in mid-training",
        )

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()
            process.stdout.close()
        self.queue.close()


def inside(words: Sequence[object], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run `hpo WORDS` in this process; return its exit code and what it prints."""
    log, messages = logging.getLogger(), Messages()
    with tempfile.TemporaryFile() as file, mock.patch.dict(os.environ, environment):
        output, errors = (Output(file.fileno(), "utf-8", lines=True) for _ in range(2))
        log.addHandler(messages)
        try:
            with redirect_stdout(output), redirect_stderr(errors):
                code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            log.removeHandler(messages)
        output.flush()
        errors.flush()
        file.seek(0)
        return code, file.read().decode()


def at_once(*functions: Callable[[], object]) -> list:
    """What each gives, called by threads that start together; an error of any is raised."""
    start = threading.Barrier(len(functions))

    def call(function: Callable[[], object]) -> object:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(call, functions))


def clock(process: subprocess.Popen) -> float:
    """Seconds, without those in which the process wanted to run and other processes had the cores: for what it promises
    to do in time, on a busy machine too."""
    try:
        waited = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9  # of its main thread
    except OSError:
        waited = 0.0  # not Linux
    return time.monotonic() - waited


def until_ended(process: subprocess.Popen) -> None:
    """Wait for the end of a process, and leave it to be asked for its clock and its output."""
    end = time.monotonic() + PATIENCE
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < end, f"it does not end within {PATIENCE:.0f} s"
        time.sleep(0.01)


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    """The trainers of a worker."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # git, say
            found += [child] if "hpo.worker.trainer" in " ".join(child.cmdline()) else []
    return found


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A worker with its trainers."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def suspend(processes: Iterable[psutil.Process]) -> None:
    """Freeze them, as a hypervisor or a laptop's lid does; one that has just ended does not matter."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()


def resume(processes: Iterable[psutil.Process]) -> None:
    """Let them go on; one that has ended does not matter."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def postgres_processes(read: Settings) -> list[psutil.Process]:
    """The embedded postmaster and all its children; none where none runs."""
    home = homes.read(read.home.resolve())
    try:
        assert home is not None
        postmaster = psutil.Process(int((home.data / "postmaster.pid").read_text().splitlines()[0]))
        return [postmaster, *postmaster.children()]
    except (OSError, psutil.Error, AssertionError, ValueError, IndexError):
        return []


def mlflow_processes(read: Settings) -> list[psutil.Process]:
    """The embedded MLflow server's processes."""
    home = homes.read(read.home.resolve())
    return mlflow_server._processes(home) if home is not None else []


def create_database(url: str, name: str) -> str:
    """SQLAlchemy URL of a new, empty database beside the one at `url`."""
    server = url.rpartition("/")[0]
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server}/{name}"


@contextmanager
def fresh_database(services: Services) -> Iterator[str]:
    """SQLAlchemy URL of an empty database, dropped afterwards with whoever is still connected."""
    name = f"test_{secrets.token_hex(6)}"
    server = services.database_url.rpartition("/")[0]
    yield create_database(services.database_url, name)
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def read_only(services: Services, url: str) -> Iterator[None]:
    """The database takes no changes inside of the block, as after a failover to a server that only follows yet; at both
    ends every connection is dropped."""
    name = url.rpartition("/")[2]
    with psycopg.connect(f"{services.database_url.rpartition('/')[0]}/postgres", autocommit=True) as connection:
        for how in ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"):
            connection.execute(sql.SQL("ALTER DATABASE {} " + how).format(sql.Identifier(name)))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            if how.startswith("SET"):
                yield


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """The folder as a small file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "hpo-test", folder]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def mirrored(shell: Shell, study: str) -> Iterator[Reconciler]:
    """The study as this process sees it in the database, Optuna and MLflow."""
    store = storage(shell.database_url)
    try:
        yield Reconciler(shell.queue, Tracker(shell.tracking_uri), store, shell.queue.study(study))
    finally:
        store.remove_session()
        store.engine.dispose()


def check_recorded_once(shell: Shell, study: str, *, points: int, epochs: int) -> None:
    """Every view of the study - ours, Optuna's, MLflow's - shows each point once, with its whole curve."""
    with mirrored(shell, study) as shown:
        violations = invariants.check(shown)
    assert not violations, violations
    jobs = shell.trials(study)
    assert [(job.state, job.reason) for job in jobs if job.state != "done"] == []
    assert len(jobs) == points
    assert len({json.dumps(job.spec.point) for job in jobs}) == points
    store = storage(shell.database_url)
    loaded = optuna.load_study(study_name=study, storage=store)
    frame = loaded.trials_dataframe()
    assert list(frame.state) == ["COMPLETE"] * points
    assert len(frame.filter(like="params_").drop_duplicates()) == points
    scores = frame["value" if len(loaded.directions) == 1 else "values_0"]
    assert list(scores) == [job.result.best_val_nmse for job in jobs]
    store.remove_session()
    store.engine.dispose()
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name(study)
    runs = client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'trial'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_id for run in runs) == sorted(job.run_id for job in jobs)
    for job in jobs:
        curve = client.get_metric_history(job.run_id, "val/nmse")
        assert [metric.step for metric in curve] == list(range(1, epochs + 1)), "a gap or a doubled step"
        ours = dict(shell.queue.curve(job.id))
        assert [metric.value for metric in curve] == [ours[step]["val/nmse"] for step in range(1, epochs + 1)]
        assert min(metric.value for metric in curve) == job.result.best_val_nmse
    everything = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in everything} == {"FINISHED"}
    assert len(client.search_logged_models([experiment.experiment_id])) == points
