"""Workers as an array job of SLURM: submitit hands them in and starts them again, squeue shows and scancel ends them.

What runs on a node is `hpo worker`, as anywhere else. SLURM's queue is the only record of the array, found by its job
name: the same command, run again from any terminal, watches the same array. `hpo stop` ends an array for
good, with those of its tasks that start later or again: the next `hpo run` hands in another one, by another name.
"""

import ipaddress
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpo import ownership
from hpo.errors import ServiceError, SettingsError
from hpo.queue import ENDED, DatabaseLost, Queue, Stop, StudyRow
from hpo.settings import Settings
from hpo.text import counted

IDLE_EXIT = 120  # seconds; a node that trains nothing belongs to others
WARNING = 60  # seconds before its time limit at which a worker is told to hand back; SLURM may add 60
TIME = 60  # minutes a worker gets unless told otherwise: it is started again, and short jobs find a place early
SHORTEST = 5  # minutes; the warning would come before the first epoch
RESTARTS = 10_000  # at the time limit; the study's end is what ends them
POLL = 5.0  # seconds between two looks into SLURM's queue
TICK = 0.5  # seconds
STOPPED = 130  # exit code of a worker that was told to leave
ANSWER_TIMEOUT = 60.0  # seconds SLURM's programs have; they wait long for a controller that restarts
WAITING = "--state=PENDING"  # scancel's word for tasks that run nowhere, requeued ones among them

# Options of sbatch that decide whether this works at all.
OURS = {"array", "chdir", "error", "export", "get-user-env", "input", "job-name", "no-requeue", "nodes", "ntasks"}
OURS |= {"ntasks-per-node", "open-mode", "output", "signal", "wrap"}


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM for each study."""

    workers: int
    options: Mapping[str, Any]  # of sbatch, by their long names; True for one without a value
    words: tuple[str, ...]  # of `hpo worker`, beside the study's name

    def check(self, settings: Settings) -> None:
        """Raise ServiceError if nothing can be handed in here, or the nodes could not reach the services."""
        if odd := [sign for sign in "%\\\n" if sign in str(settings.home)]:
            raise ServiceError(
                f"--on slurm: SLURM reads {odd[0]!r} in the name of a log as something else, and logs go below "
                f"{settings.home}: set HPO_HOME to a folder without it."
            )
        if not all(shutil.which(program) for program in ("sbatch", "srun", "squeue", "scancel", "sinfo")):
            raise ServiceError("--on slurm: SLURM's sbatch is not on this machine. Run this on a login node.")
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ServiceError("--on slurm needs submitit, an extra of hpo: pip install 'hpo[slurm]'") from None
        urls = (settings.database_url, settings.tracking_uri)
        if any(url is None or _here_only(url) for url in urls) and (others := self._nodes() - {_host()}):
            raise ServiceError(
                f"--on slurm: the workers run on other hosts ({', '.join(sorted(others)[:3])}, …), and those reach "
                "neither the embedded services nor any on 127.0.0.1. Set HPO_CREDENTIALS (or HPO_DATABASE_URL and "
                "MLFLOW_TRACKING_URI) to services that they reach."
            )

    def _nodes(self) -> set[str]:
        """Host names of the nodes the workers may get."""
        chosen = [f"--{flag}={self.options[key]}" for key, flag in _NODES.items() if key in self.options]
        return {name.partition(".")[0] for name in _slurm("sinfo", "--noheader", "--Node", "--format=%n", *chosen)}


_NODES = {"partition": "partition", "nodelist": "nodes"}  # sbatch's name, sinfo's name


@dataclass(frozen=True)
class Array:
    """The array job of one study, as SLURM's queue knows it by its name."""

    job_name: str
    folder: Path  # of submitit's files, and the workers' logs

    def tasks(self) -> list["Task"]:
        """Those waiting, running or ending. Raises ServiceError if SLURM does not answer."""
        rows = _slurm("squeue", "--me", "--noheader", "--array", f"--name={self.job_name}", "--format=%i|%T|%N|%r")
        return [Task(*row.split("|")) for row in rows]

    def cancel(self, *filters: str) -> None:
        """Have SLURM end its tasks, or those that filters of scancel leave: SIGTERM, and after the cluster's KillWait
        (30 s by default) SIGKILL. Raises ServiceError if SLURM does not answer."""
        _slurm("scancel", "--quiet", "--me", f"--name={self.job_name}", *filters)


@dataclass(frozen=True)
class Task:
    """One line of SLURM's queue."""

    id: str  # such as 12_3
    state: str  # such as PENDING
    node: str
    reason: str  # why it waits

    @property
    def job(self) -> str:
        return self.id.partition("_")[0]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` or `KEY` of sbatch's long options. Raises SettingsError."""
    options: dict[str, Any] = {}
    for word in words:
        key, given, value = word.partition("=")
        key = key.removeprefix("--").replace("_", "-")
        if not re.fullmatch("[a-z][a-z-]*", key) or "\n" in value:
            raise SettingsError(f"--slurm: expected KEY=VALUE such as partition=gpu, found {word!r}.")
        if key in OURS:
            raise SettingsError(f"--slurm: {key} is set by hpo itself.")
        options[key] = value if given else True
    if "time" in options:
        options["time"] = minutes(options["time"])
        if options["time"] < SHORTEST:
            raise SettingsError(f"--slurm: time: expected at least {SHORTEST} minutes, found {options['time']}.")
    if "cpus-per-task" in options:
        if not re.fullmatch("[1-9][0-9]*", str(options["cpus-per-task"])):
            raise SettingsError(f"--slurm: cpus-per-task: expected a whole number, found {options['cpus-per-task']!r}.")
        options["cpus-per-task"] = int(options["cpus-per-task"])
    return options


def minutes(text: str) -> int:
    """SLURM's time, such as `90`, `1:30:00` or `2-12`, in minutes, rounded up. Raises SettingsError."""
    days, dash, clock = str(text).rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", str(text)):
        raise SettingsError(f"--slurm: time: expected minutes, hours:minutes:seconds or days-hours, found {text!r}.")
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = (*map(int, parts), 0, 0)[:3]
    else:  # minutes[:seconds] or hours:minutes:seconds
        hours, mins, seconds = (0, *map(int, parts), 0)[:3] if len(parts) < 3 else tuple(map(int, parts))
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def hand_in(
    request: Request, settings: Settings, queue: Queue, row: StudyRow, *, report: Callable[[str], object]
) -> Array:
    """Have workers of this study in SLURM's queue, unless there are some already that nobody has asked to stop. Raises
    ServiceError."""
    array = Array(
        f"hpo-{row.name}-{queue.database_id()[:8]}-{row.stops}", ownership.folder(settings.home, "slurm", row.name)
    )
    with queue.lock(f"slurm.{row.name}"):  # two runs at once hand in one array
        tasks = array.tasks()
        if tasks:
            report(f"SLURM has {_workers(len(tasks))} already, as job {tasks[0].job}; logs: {array.folder}/")
        else:
            job = _submit(request, array, row)
            report(f"Handed {_workers(request.workers)} to SLURM as job {job}; logs: {array.folder}/")
    report("Ctrl-C cancels them. They go on if this terminal goes away; the same command shows them again.")
    return array


def _workers(number: int) -> str:
    return counted(number, "worker")


def _submit(request: Request, array: Array, row: StudyRow) -> str:
    import submitit

    options = dict(request.options)
    limit = options.pop("time", TIME)
    python = f"{shlex.quote(sys.executable)} -P"  # a task begins in the folder where it was handed in
    executor = submitit.SlurmExecutor(array.folder, max_num_timeout=RESTARTS, python=python)
    executor.update_parameters(
        job_name=array.job_name,
        time=limit,
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        wckey=None,
        # srun does not take this over from sbatch
        srun_args=[f"--cpus-per-task={options['cpus-per-task']}"] if "cpus-per-task" in options else None,
        additional_parameters={"requeue": True, **options},
    )
    words = ("--study", row.name, "--stops", str(row.stops), "--idle-exit", str(IDLE_EXIT), *request.words)
    try:
        jobs = executor.submit_array([Worker(words)] * request.workers)
    except submitit.core.utils.FailedJobError:  # it has printed what sbatch said
        raise ServiceError("--on slurm: sbatch refused the job, for the reason above.") from None
    except submitit.core.utils.FailedSubmissionError as error:
        raise ServiceError(f"--on slurm: {error}") from None
    return jobs[0].job_id.partition("_")[0]


def watch(
    array: Array, queue: Queue, row: StudyRow, *, interrupts: Sequence[int], tick: Callable[[str], None]
) -> tuple[bool | None, Stop | None]:
    """Wait until the study is closed; whether it is, None after Ctrl-C or `hpo stop`, and who gave that. Raises
    ServiceError if no worker is left."""
    tasks, trouble, next_look = array.tasks(), None, 0.0
    cancelled, asked = False, None
    while len(interrupts) < 2:
        now = time.monotonic()
        if now >= next_look or (interrupts and not cancelled):
            next_look = now + POLL
            try:
                if interrupts and not cancelled:
                    array.cancel()
                    cancelled = True
                elif asked is not None:  # at every look: one that SLURM was ending just now may wait again
                    array.cancel(WAITING)
                tasks, trouble = array.tasks(), None
            except ServiceError as error:  # its controller restarts, say
                trouble = str(error)
        with suppress(DatabaseLost):  # asked after SLURM: a worker closes its study before it leaves
            if queue.closing_state(row.name) in ENDED:
                with suppress(ServiceError):  # they would leave at once
                    array.cancel(WAITING)
                return True, None
            orders = queue.orders("", stops={row.name: row.stops}, held=())
            if asked is None and (asked := orders.stopped.get(row.name)):
                next_look = now
            if not tasks and (cancelled or asked is not None):
                return None, asked
            if not tasks:
                raise ServiceError(
                    f"No worker of {row.name} is left in SLURM's queue, and the study is not closed. What is done is "
                    f"kept; the same command hands in others. Why they ended: {array.folder}/*_log.out"
                )
        tick(trouble or summary(tasks, cancelled=cancelled))
        time.sleep(TICK)
    return None, None


@contextmanager
def collect_interrupts() -> Iterator[list[int]]:
    """Collects each Ctrl-C instead of raising."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def summary(tasks: Sequence[Task], *, cancelled: bool = False) -> str:
    """The array in one line."""
    nodes = sorted({task.node for task in tasks if task.state == "RUNNING"})
    reasons = sorted({task.reason for task in tasks if task.state == "PENDING"} - {"None"})
    words = []
    for state in dict.fromkeys(task.state for task in tasks):
        where = {"RUNNING": nodes, "PENDING": reasons}.get(state, [])
        more = f" ({', '.join([*where[:3], *(['…'] if where[3:] else [])])})" if where else ""
        words.append(f"{sum(task.state == state for task in tasks)} {state.lower()}{more}")
    return f"SLURM: {'cancelled, giving trials back: ' if cancelled else ''}{', '.join(words) or 'no workers'}"


class Worker:
    """What submitit runs in a task of the array: one `hpo worker`, and what SLURM leaves to the job itself.

    SLURM signals every process of a step, so SIGTERM (preemption, scancel) reaches the worker, which hands back. Left
    to do: to be requeued where SLURM will not, at the time limit and when a preempted job leaves within its grace time.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)  # no secrets: this is pickled onto a shared disk
        self.child = 0
        self.terminated = False

    def __call__(self) -> int:
        import submitit

        signal.signal(signal.SIGTERM, self._terminate)
        command = [sys.executable, "-P", "-m", "hpo", "worker", *self.words]
        process = subprocess.Popen(command, preexec_fn=_ignore_warning)
        self.child = process.pid
        if self.terminated:
            self._end()
        self._wait()
        self.child = 0
        code = process.wait()
        job = submitit.JobEnvironment().job_id  # 12_3: the bare number means the whole array for task 0's job
        if self.terminated:
            if _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T") == ["RUNNING"]:
                _slurm("scontrol", "requeue", job)  # it was asked to leave, and nobody ends it: a grace time
        elif code not in (0, STOPPED):
            raise RuntimeError(f"hpo worker ended with exit code {code}, for the reason above")
        return code

    def checkpoint(self) -> Any:
        """Called by submitit at the signal before the time limit: hand back, and go on after a requeue."""
        import submitit

        self._end()
        self._wait()
        return submitit.helpers.DelayedSubmission(Worker(self.words))

    def _terminate(self, number: int, frame: Any) -> None:
        self.terminated = True

    def _end(self) -> None:
        if self.child:
            os.kill(self.child, signal.SIGTERM)

    def _wait(self) -> None:
        """Wait for the end of the worker, without Popen's lock: a signal may call this within itself."""
        if self.child:
            os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT)


def _ignore_warning() -> None:
    """In the worker and all of its trainers: the signal before the time limit is for submitit."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _slurm(*words: str) -> list[str]:
    """The lines one of SLURM's programs prints. Raises ServiceError with what it says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ServiceError(f"SLURM does not answer {words[0]} within {ANSWER_TIMEOUT:.0f} s.") from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ServiceError(f"SLURM does not answer {words[0]}: {said}")
    return done.stdout.split("\n")[:-1]


def _here_only(url: str) -> bool:
    """Return whether a URL leads to this machine from every machine: loopback, or a socket."""
    host = urlsplit(url).hostname
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name


def _host() -> str:
    return socket.gethostname().partition(".")[0]
