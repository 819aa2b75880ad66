"""Workers as an array job of SLURM: submitit hands them in and starts them again, squeue shows and scancel ends them.

SLURM's queue is the only record of the array, found by its job name. `hpo stop` ends an array for good, with those of
its tasks that start later or again: the next `hpo run` hands in another one, by another name.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from hpo import ownership
from hpo.errors import ServiceError, SettingsError
from hpo.launch.engine import Fate, Fleet, Placed, Resources, key_values, whole
from hpo.launch.reach import require_reachable
from hpo.settings import Settings

WARNING = 60  # seconds before its time limit at which a worker is told to hand back; SLURM may add 60
TIME = 60  # minutes a worker gets unless told otherwise: it is started again, and short jobs find a place early
SHORTEST = 5  # minutes; the warning would come before the first epoch
RESTARTS = 10_000  # at the time limit; the study's end is what ends them
STOPPED = 130  # exit code of a worker that was told to leave
ANSWER_TIMEOUT = 60.0  # seconds SLURM's programs have; they wait long for a controller that restarts
WAITING = "--state=PENDING"  # scancel's word for tasks that run nowhere, requeued ones among them
PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "sinfo")
OUTPUT = 4000  # characters of a log that are read

# Options of sbatch that decide whether this works at all.
OURS = {"array", "chdir", "error", "export", "get-user-env", "input", "job-name", "no-requeue", "nodes", "ntasks"}
OURS |= {"ntasks-per-node", "open-mode", "output", "signal", "wrap"}
NAMES = {"cpus": "cpus-per-task", "memory": "mem"}  # of all engines, and sbatch's own
NODES = {"partition": "partition", "nodelist": "nodes"}  # sbatch's name, sinfo's name
HOPELESS = {"BadConstraints", "PartitionNodeLimit", "PartitionTimeLimit"}  # SLURM's words for why a task waits
FATES = {"PENDING": Fate.WAITING, "CONFIGURING": Fate.WAITING, "REQUEUED": Fate.WAITING, "RUNNING": Fate.RUNNING}


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """SLURM, with what each task of the array gets."""

    title: ClassVar[str] = "SLURM"
    options: Mapping[str, Any]  # of sbatch, by their long names; True for one without a value
    settings: Settings

    @classmethod
    def parse(cls, words: Sequence[str], settings: Settings) -> Self:
        """`KEY=VALUE` or `KEY` of sbatch's long options. Raises SettingsError."""
        options: dict[str, Any] = {**key_values("slurm", words, own=NAMES)}
        for key in OURS & options.keys():
            raise SettingsError(f"--slurm: {key} is set by hpo itself.")
        if "time" in options:
            options["time"] = minutes(options["time"])
            if options["time"] < SHORTEST:
                raise SettingsError(f"--slurm: time: expected at least {SHORTEST} minutes, found {options['time']}.")
        if "cpus-per-task" in options:
            options["cpus-per-task"] = whole("slurm", "cpus-per-task", options["cpus-per-task"])
        return cls(options=options, settings=settings)

    @property
    def resources(self) -> Resources:
        """What each task gets, as far as the options say."""
        has_gpus = any("gpu" in f"{key}={value}".lower() for key, value in self.options.items())
        return Resources(cpus=self.options.get("cpus-per-task"), has_gpus=has_gpus)

    def sized(self, cpus: int) -> Self:
        """The same with so many cores for each task, where the options say nothing of them."""
        return replace(self, options={"cpus-per-task": cpus, **self.options})

    def check(self) -> None:
        """Raise ServiceError if nothing can be handed in here, or the nodes could not reach the services."""
        if odd := [sign for sign in "%\\\n" if sign in str(self.settings.home)]:
            raise ServiceError(
                f"--on slurm: SLURM reads {odd[0]!r} in the name of a log as something else, and logs go below "
                f"{self.settings.home}: set HPO_HOME to a folder without it."
            )
        if not all(shutil.which(program) for program in PROGRAMS):
            raise ServiceError("--on slurm: SLURM's sbatch is not on this machine. Run this on a login node.")
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ServiceError("--on slurm needs submitit, an extra of hpo: pip install 'hpo[slurm]'") from None
        require_reachable("slurm", self.settings, self._nodes)

    def _nodes(self) -> set[str]:
        """Host names of the nodes the workers may get."""
        chosen = [f"--{flag}={self.options[key]}" for key, flag in NODES.items() if key in self.options]
        return set(_slurm("sinfo", "--noheader", "--Node", "--format=%n", *chosen))

    def hand_in(self, fleet: Fleet, commands: Sequence[Sequence[str]]) -> None:
        """Submit an array of one task for each command. Raise ServiceError if sbatch refuses it."""
        import submitit

        options = dict(self.options)
        limit = options.pop("time", TIME)
        python = f"{shlex.quote(sys.executable)} -P"  # a task begins in the folder where it was handed in
        executor = submitit.SlurmExecutor(self._folder(fleet), max_num_timeout=RESTARTS, python=python)
        executor.update_parameters(
            job_name=fleet.name,
            time=limit,
            signal_delay_s=WARNING,
            stderr_to_stdout=True,
            wckey=None,
            # srun does not take this over from sbatch
            srun_args=[f"--cpus-per-task={options['cpus-per-task']}"] if "cpus-per-task" in options else None,
            additional_parameters={"requeue": True, **options},
        )
        try:
            executor.submit_array([Worker(words) for words in commands])
        except submitit.core.utils.FailedJobError:  # it has printed what sbatch said
            raise ServiceError("--on slurm: sbatch refused the job, for the reason above.") from None
        except submitit.core.utils.FailedSubmissionError as error:
            raise ServiceError(f"--on slurm: {error}") from None

    def placed(self, fleet: Fleet) -> list[Placed]:
        """Tasks that wait, run or end; SLURM forgets those that have ended. ServiceError if it does not answer."""
        rows = _slurm("squeue", "--me", "--noheader", "--array", f"--name={fleet.name}", "--format=%i|%T|%N|%r")
        tasks = []
        for row in rows:
            task, state, node, reason = row.split("|")
            fate = FATES.get(state, Fate.LEAVING)
            why = reason if fate == Fate.WAITING and reason != "None" else ""
            host = node if fate == Fate.RUNNING else ""
            tasks.append(Placed(id=task, fate=fate, host=host, reason=why, is_hopeless=why in HOPELESS))
        return tasks

    def take_back(self, fleet: Fleet, *, waiting_only: bool = False) -> None:
        """Have SLURM end its tasks, or those that wait: SIGTERM, and after the cluster's KillWait (30 s by default)
        SIGKILL. Raise ServiceError if SLURM does not answer."""
        _slurm("scancel", "--quiet", "--me", f"--name={fleet.name}", *([WAITING] if waiting_only else []))

    def output(self, fleet: Fleet) -> str:
        """The end of the newest log, without submitit's own lines."""
        logs = sorted(self._folder(fleet).glob("*_log.out"), key=lambda path: path.stat().st_mtime)
        text = logs[-1].read_text(encoding="utf-8", errors="replace")[-OUTPUT:] if logs else ""
        return "\n".join(line for line in text.splitlines() if not line.startswith("submitit "))

    def forget(self, fleet: Fleet) -> None:
        """Remove the folder of its logs."""
        shutil.rmtree(self._folder(fleet), ignore_errors=True)  # a task that ends writes there still, perhaps

    def logs(self, fleet: Fleet) -> str:
        """The pattern of the logs."""
        return f"{self._folder(fleet)}/*_log.out"

    def _folder(self, fleet: Fleet) -> Path:
        """Of submitit's files, and the workers' logs."""
        return ownership.folder(self.settings.home, "slurm", *fleet.folder.split("/"))


def minutes(text: str | bool) -> int:
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
        command = [sys.executable, "-P", "-m", "hpo", *self.words]
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
