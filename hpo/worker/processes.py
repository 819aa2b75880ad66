"""The supervisor's end of a trainer or suggester process: start it, send requests, read events, end it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hpo.queue import Job
from hpo.services import home as homes

# One thread each, unless the study says otherwise: one such trainer per core gets more done than one with many threads.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ENVIRONMENT["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matrix products on a GPU need

READ = 2**20  # bytes: what writes faster than we read must not keep us from everything else


class Child:
    """One `python -P -m hpo.worker.MODULE` with a pipe each way. -P: not from the folder where the user stands."""

    def __init__(self, module: str, log: IO[bytes], *, gpu: str | None = None) -> None:
        self.module = module
        environment = {**os.environ, **_ENVIRONMENT}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._events, events = os.pipe()
        os.set_blocking(self._events, False)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"hpo.worker.{module}", str(events)],
                stdin=subprocess.PIPE,
                stdout=log,  # not for the events: whatever Python runs before hpo.worker.trainer may print
                stderr=log,
                env=environment,
                pass_fds=(events,),
            )
        except BaseException:
            os.close(self._events)
            raise
        finally:
            os.close(events)
        assert self.process.stdin
        self._stdin = self.process.stdin
        self._partial = b""
        self.ready = False
        self.killed: str | None = None  # why we killed it
        self.last_event = time.monotonic()
        self.closed = False

    def fileno(self) -> int:
        return self._events

    def _write(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError, ValueError):  # ValueError: closed by us after its death
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()

    def events(self) -> list[dict[str, Any]]:
        """Events that have arrived, those of READ bytes at a time; sets `closed` when there are no more, since the
        process has ended."""
        chunks, size = [], 0
        try:
            while size < READ and (chunk := os.read(self.fileno(), 1 << 16)):
                chunks.append(chunk)
                size += len(chunk)
            self.closed = size < READ
        except BlockingIOError:
            pass  # nothing more for now
        *lines, self._partial = (self._partial + b"".join(chunks)).split(b"\n")
        if lines:
            self.last_event = time.monotonic()
        return [json.loads(line) for line in lines]

    def kill(self, why: str | None = None) -> None:
        self.killed = self.killed or why
        self.process.kill()

    def close(self, timeout: float = 2.0) -> None:
        """Close its input, which ends it; kill it if that takes longer than `timeout` seconds."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._events)

    def obituary(self) -> str:
        """Why it ended, in a few words."""
        code = self.process.wait()
        if self.killed is not None:
            return self.killed
        if code >= 0:
            return f"{self.module} ended with exit {code}"
        name = signal.Signals(-code).name
        hint = ", likely out of memory" if -code == signal.SIGKILL else ""
        return f"{self.module} killed by {name} (exit {128 - code}{hint})"


class Trainer(Child):
    """One `hpo.worker.trainer`, with the job it is busy with.

    `task` is None when idle, "reserved" while something is fetched for it, else the request it works on.
    """

    def __init__(self, log: IO[bytes], *, gpu: str | None = None) -> None:
        super().__init__("trainer", log, gpu=gpu)
        self.gpu = gpu
        self.job: Job | None = None
        self.task: str | None = None
        self.asked = False  # to hand back
        self.fetches = 0  # of the data set by its worker, before it was given this job

    @property
    def free(self) -> bool:
        return self.ready and self.task is None and not self.closed

    def has(self, job: Job) -> bool:
        """Whether it is busy with this claim of this job."""
        return self.job is not None and (self.job.id, self.job.fence) == (job.id, job.fence)

    def reserve(self, job: Job) -> None:
        self.job, self.task, self.asked = job, "reserved", False

    def release(self) -> None:
        self.job = self.task = None

    def ask(self) -> None:
        """Ask it to hand its trial back at the next batch."""
        self.asked = True
        self._write({"do": "stop"})

    def send(self, do: str, **fields: Any) -> None:
        """Send a request; a trainer that died meanwhile shows up as end of file in `events`."""
        self.last_event, self.task = time.monotonic(), do  # in this order: another thread looks for hung ones
        self._write({"do": do, **fields})


class Suggester(Child):
    """One `hpo.worker.suggester`, with the trainers that wait for the points of their jobs."""

    def __init__(self, log: IO[bytes]) -> None:
        super().__init__("suggester", log)
        self.waiting: dict[tuple[int, int], tuple[Trainer, Job]] = {}  # by job and fence

    def ask(self, trainer: Trainer, job: Job, *, database_url: str) -> None:
        """Let the sampler choose the job's point."""
        self.last_event = time.monotonic()
        self.waiting[job.id, job.fence] = (trainer, job)
        self._write({"do": "fill", "database_url": database_url, "study": job.study, "job": job.id, "fence": job.fence})

    def answered(self, job_id: int, fence: int) -> tuple[Trainer, Job] | None:
        """The trainer that has waited, free again, and its job; None if it waits no more."""
        trainer, job = self.waiting.pop((job_id, fence), (None, None))
        if trainer is None or job is None or not trainer.has(job):
            return None
        trainer.release()
        return trainer, job


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs we may use, as CUDA_VISIBLE_DEVICES names them: those it lists, else all that have a device."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        # CUDA counts from 0 what a container was given, whatever the devices' numbers are on the host.
        return [str(index) for index, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    named = [name.strip() for name in listed.split(",")]
    return [name for name in named[: named.index("-1") if "-1" in named else None] if name]  # CUDA stops at a -1


def next_gpu(visible: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The first of the visible GPUs that fewest trainers have: round robin, also after one died. None if none is."""
    return min(visible, key=taken.count, default=None)


def open_log(home: Path, name: str) -> IO[bytes]:
    """The worker's log file for what trainers print, appended to."""
    file = homes.folder(home, "logs") / f"{name}.log"
    return open(file, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600))
