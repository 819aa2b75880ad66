"""`hpo run --on slurm`: what is asked of SLURM, and a study on a real one-node cluster whose workers are preempted."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import cells
import psutil
import pytest
from engines import check_engine
from mlflow import MlflowClient
from shell import PATIENCE, mirrored

from hpo import settings
from hpo.errors import ServiceError, SettingsError
from hpo.launch import slurm
from hpo.launch.slurm import Slurm
from hpo.operations import invariants
from hpo.services import daemon

HOST = socket.gethostname().partition(".")[0]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
KillWait=20
CompleteWait=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
NodeName=elsewhere NodeAddr=127.0.0.2 State=DOWN
PartitionName=patient Nodes={host} PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF
PartitionName=everywhere Nodes=ALL Default=YES
"""


class Cluster:
    """munged, slurmctld and slurmd on this host as plain processes, on free ports."""

    def __init__(self) -> None:
        # Not in pytest's folder: the path of a socket, with the host's name in it, has a hundred characters at most.
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder, self.environment = folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.started: list[subprocess.Popen] = []
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        ports = [daemon.choose_port(None), daemon.choose_port(None)]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=HOST, ports=ports, folder=folder))

    def start(self) -> None:
        names = (
            "key-file=munge.key",
            "socket=munge.socket",
            "pid-file=munge.pid",
            "log-file=munge.log",
            "seed-file=seed",
        )
        munge = [f"--{name.replace('=', f'={self.folder}/')}" for name in names]
        self._start("munged", "--foreground", "--force", *munge)  # whoever may enter the folder: it is a test's
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", HOST)
        self.until(lambda: self("sinfo", "-h", "-p", "patient", "-o", "%T", check=False) == "idle\n", "a node")

    def __call__(self, *words: object, check: bool = True) -> str:
        done = subprocess.run(list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def tasks(self) -> dict[str, str]:
        """State by id of all that is in the queue."""
        return dict(line.split("|") for line in self("squeue", "-h", "-r", "-o", "%i|%T").splitlines())

    def empty(self) -> bool:
        return not self.tasks()

    def stop(self) -> None:
        if len(self.started) == 3 and all(process.poll() is None for process in self.started):
            self("scancel", "--me", check=False)
            self.until(self.empty, "the end of all jobs")
        for process in reversed(self.started):
            process.terminate()
            process.wait(PATIENCE)
        shutil.rmtree(self.folder)

    def _start(self, program: str, *words: str) -> None:
        with (self.folder / f"{program}.out").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    [program, *words], env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that SLURM, or what runs in it, does."""
        end = time.monotonic() + PATIENCE
        while not condition():
            logs = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out")]
            assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}\n" + "\n".join(logs)
            time.sleep(0.2)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.mark.acceptance
@pytest.mark.slow
@pytest.mark.apt
@pytest.mark.root
def test_workers_on_slurm_lose_nothing_when_preempted_timed_out_or_cancelled(cluster, shell, data, tmp_path):
    study = cells.study(tmp_path, "array", data=data, epochs=3)
    # Two trials that no machine finishes while we look, claimed first; they are cancelled in the end.
    text = (
        study.read_text()
        .replace("[2, 4]", "[4]")
        .replace("learning_rate = [1e-3, 1e-4]", "epochs = [99999, 99998, 60]")
    )
    study.write_text(text.replace("epochs = 3\n", "learning_rate = 1e-2\n"))
    shell.environment["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    run = ("run", "--study", study, "--on", "slurm", "--workers", 2)
    run += ("--slurm", "partition=patient", "--slurm", "time=20")

    output = shell.hpo("run", "--study", study, "--on", "slurm", code=1)
    assert "run on other hosts (elsewhere" in output and "Set HPO_CREDENTIALS" in output, "services on loopback"
    output = shell.hpo("run", "--study", study, "--on", "slurm", "--slurm", "partition=unknown", code=1)
    assert "invalid partition specified: unknown" in output and "sbatch refused the job" in output

    def both_training(after: Sequence[int]) -> None:
        """Wait until both long trials are trained, and further than these epochs."""
        cluster.until(
            lambda: all(
                job.alive and job.epochs > epoch for job, epoch in zip(shell.trials("array"), after, strict=False)
            ),
            "two in mid-trial",
        )

    first = shell.start(*run)
    shell.until(lambda: len(shell.trials("array")) == 3, "the plan")
    both_training(after=[20, 20])
    ids = sorted(cluster.tasks())
    assert [each.partition("_")[2] for each in ids] == ["0", "1"]
    first.send_signal(signal.SIGHUP)  # its terminal goes away
    first.wait(PATIENCE)

    # SLURM's signal before the time limit for one, preemption with a grace time for the other
    cluster("scancel", "--signal=USR2", ids[0])
    cluster("sbatch", "-p", "urgent", "-c", 2, "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.until(lambda: not any(job.state == "running" for job in shell.trials("array")), "both handed back")
    kept = shell.trials("array")[:2]
    assert [(job.state, job.attempt) for job in kept] == [("waiting", 0)] * 2
    for job in kept:
        if job.reason == "handed back":  # and not "stopped": its trainer was too slow on a busy machine
            assert job.checkpoint.epoch == job.epochs > 20

    second = shell.start(*run)
    both_training(after=[job.epochs for job in kept])
    for each in ids:
        assert "Restarts=1" in cluster("scontrol", "show", "job", each)
    arguments = [word for process in psutil.process_iter() for word in _words(process)]
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 130 and "The same command goes on." in output
    assert "SLURM has 2 workers already, as hpo-array-" in output
    assert cluster.empty()
    assert {(job.state, job.attempt) for job in shell.trials("array")} == {("waiting", 0)}

    # stopped while they wait for a node, before the eyes of `hpo run` and behind its back
    blocker = cluster("sbatch", "--parsable", "-p", "urgent", "-c", 2, "-o", "/dev/null", "--wrap", "sleep 600").strip()

    def waiting(number: int) -> None:
        cluster.until(lambda: list(cluster.tasks().values()).count("PENDING") == number, f"{number} wait")

    third = shell.start(*run)
    waiting(2)
    assert "Nobody works on array; 0 of 3 trials are done." in shell.hpo("stop", "--study", "array")
    output, _ = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0 and "(hpo stop): what is done is kept. The same command goes on." in output
    assert cluster.tasks() == {blocker: "RUNNING"}

    fourth = shell.start(*run)
    waiting(2)
    fourth.kill()
    (late,) = {each.partition("_")[0] for each in cluster.tasks()} - {blocker}
    shell.hpo("stop", "--study", "array", "--no-wait")
    for number in (0, 1):
        shell.hpo("cancel", "--study", "array", "--trial", number)

    fifth = shell.start(*run)
    waiting(4)
    cluster("scancel", blocker)
    output, _ = fifth.communicate(timeout=PATIENCE)
    assert fifth.returncode == 0 and "Handed 2 workers to SLURM, as hpo-array-" in output, output
    cluster.until(cluster.empty, "the workers leave when the study is closed")
    logs = {path: path.read_text() for path in (shell.home / "slurm" / "array").glob("*.out")}
    told = [text for path, text in logs.items() if path.name.startswith(f"{late}_")]
    assert [("(hpo stop)" in text, "claimed" in text) for text in told] == [(True, False)] * 2

    assert "Handed" not in shell.hpo(*run), "the same command prints the result again"
    with mirrored(shell, "array") as shown:
        assert invariants.check(shown) == []
    jobs, client = shell.trials("array"), MlflowClient(shell.tracking_uri)
    assert [(job.state, job.attempt) for job in jobs] == [("cancelled", 0), ("cancelled", 0), ("done", 1)]
    for job in jobs:
        steps = [point.step for point in client.get_metric_history(job.run_id, "val/nmse")]
        assert steps == list(range(1, job.epochs + 1)), "a gap or a doubled step"
    assert shell.queue.jobs("array")[0].closing.winner.version == 1
    everything = "".join(logs.values())
    assert " of array goes on after epoch " in everything and "Traceback" not in everything

    password = urlsplit(shell.database_url).password
    assert password and not any(password in word for word in arguments)
    for path in (shell.home / "slurm").rglob("*"):
        assert path.is_dir() or password.encode() not in path.read_bytes(), path


@pytest.mark.acceptance
@pytest.mark.slow
@pytest.mark.apt
@pytest.mark.root
def test_slurm_keeps_to_the_protocol_of_engines(cluster, shell, monkeypatch):
    for name, value in (shell.environment | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}).items():
        monkeypatch.setenv(name, value)
    check_engine(lambda: Slurm.parse(["partition=patient"], settings.read()), stays=["worker"], patience=PATIENCE)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_options_of_sbatch_are_taken_by_their_long_names():
    words = ["partition=gpu", "cpus_per_task=4", "--exclusive", "time=1-12", "memory=8G"]
    assert Slurm.parse(words, settings.read({})).options == {
        "partition": "gpu",
        "cpus-per-task": 4,
        "exclusive": True,
        "time": 36 * 60,
        "mem": "8G",
    }
    for wrong, message in (
        ("=gpu", "expected KEY=VALUE"),
        ("array=0-3", "array is set by hpo itself"),
        ("time=soon", "expected minutes"),
        ("time=2", "expected at least 5 minutes"),
        ("cpus-per-task=0", "expected a whole number"),
        ("cpus-per-task", "expected a whole number"),
    ):
        with pytest.raises(SettingsError, match=message):
            Slurm.parse([wrong], settings.read({}))
    with pytest.raises(SettingsError, match="expected cpus-per-task once"):
        Slurm.parse(["cpus=2", "cpus-per-task=4"], settings.read({}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("5:01", 6), ("1:30:00", 90), ("2-0", 2880), ("1-2:03", 1563), ("1-2:03:04", 1564)],
)
def test_a_time_of_slurm_is_rounded_up_to_minutes(text, expected):
    assert slurm.minutes(text) == expected


def test_without_slurm_the_message_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("sbatch") is None
    with pytest.raises(ServiceError, match="Run this on a login node"):
        Slurm.parse([], settings.read({})).check()


@pytest.mark.parametrize("name", ["50%j", "back\\slash"])
def test_a_home_whose_name_slurm_would_take_for_a_pattern_is_refused(tmp_path, name):
    read = settings.read({"HPO_HOME": str(tmp_path / name)})
    with pytest.raises(ServiceError, match=r"SLURM reads '.+' in the name of a log as something else"):
        Slurm.parse([], read).check()
