"""The child processes of a worker as its supervisor sees them: what each one is busy with, and since when.

Owned by the supervisor's thread. `start` functions are passed in, so that tests have children without processes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from hpo.queue import Job
from hpo.worker import protocol
from hpo.worker.processes import next_gpu


class Pipes(Protocol):
    """What is used of hpo.worker.processes.Process."""

    @property
    def killed(self) -> str | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def lacked_memory(self) -> bool: ...
    def fileno(self) -> int: ...
    def send(self, message: protocol.Message) -> None: ...
    def messages(self) -> list[protocol.Message]: ...
    def kill(self, reason: str | None = None) -> None: ...
    def close(self, timeout: float = 2.0) -> None: ...
    def obituary(self) -> str: ...


class Clock(Protocol):
    """What is used of the module `time`."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Child:
    """A process and the time of its last sign of life."""

    def __init__(self, process: Pipes, clock: Clock) -> None:
        self.process, self._clock = process, clock
        self.last_sign = clock.monotonic()  # seconds

    def fileno(self) -> int:
        return self.process.fileno()

    def receive(self) -> list[protocol.Message]:
        messages = self.process.messages()
        if messages:
            self.last_sign = self._clock.monotonic()
        return messages

    def hangs(self, limit: float) -> bool:
        """Return whether it owes an answer and has given no sign of life for `limit` seconds."""
        return self.owes_answer and self._clock.monotonic() - self.last_sign > limit

    @property
    def owes_answer(self) -> bool:
        raise NotImplementedError


class Trainer(Child):
    """A trainer with its job. It is free, reserved (something is fetched for its job) or works on a request.

    It gets no job of a study before it has shown that it can train that.
    """

    def __init__(self, process: Pipes, clock: Clock, *, gpu: str | None) -> None:
        super().__init__(process, clock)
        self.gpu = gpu
        self.ready = False  # it takes requests
        self.proved: set[str] = set()  # studies that it can train
        self.study: str | None = None  # of the proof that it was asked for last
        self.job: Job | None = None
        self.request: protocol.Request | None = None
        self.asked = False  # to hand back
        self.fetches = 0  # of the data set by its worker, before the trainer was given this job

    @property
    def free(self) -> bool:
        is_idle = self.ready and self.job is None and self.request is None
        return is_idle and not self.process.closed and self.process.killed is None

    @property
    def place(self) -> str:
        """The device of its attempts in the queue."""
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"

    @property
    def trains(self) -> bool:
        return isinstance(self.request, protocol.Train)

    @property
    def proves(self) -> bool:
        return isinstance(self.request, protocol.Prove)

    @property
    def owes_answer(self) -> bool:
        return self.request is not None

    def has(self, job: Job) -> bool:
        """Return whether it is busy with this claim of this job."""
        return self.job is not None and (self.job.id, self.job.fence) == (job.id, job.fence)

    def reserve(self, job: Job, *, fetches: int) -> None:
        self.job, self.request, self.asked, self.fetches = job, None, False, fetches

    def release(self) -> None:
        self.job = self.request = None

    def send(self, request: protocol.Request) -> None:
        self.request, self.last_sign = request, self._clock.monotonic()
        self.process.send(request)

    def ask_back(self) -> None:
        """Ask it to hand its trial back at the next batch."""
        if not self.asked:
            self.asked = True
            self.process.send(protocol.Stop())


class Trainers:
    """The trainers of a worker, on its GPUs in turn, or on the CPU."""

    def __init__(
        self, start: Callable[[str | None], Pipes], *, count: int, gpus: Sequence[str] = (), clock: Clock
    ) -> None:
        self._start, self._clock = start, clock
        self._lanes: list[str | None] = []  # the GPU of each trainer that is to run, None for the CPU
        for _ in range(count):
            self._lanes.append(next_gpu(gpus, self._lanes))
        self._trainers: list[Trainer] = []

    def __iter__(self) -> Iterator[Trainer]:
        return iter(list(self._trainers))

    @property
    def count(self) -> int:
        """How many are to run."""
        return len(self._lanes)

    @property
    def devices(self) -> set[str | None]:
        """The GPUs that are trained on; None stands for the CPU."""
        return set(self._lanes)

    def retire(self, gpu: str) -> None:
        """Start no trainer on this GPU any more."""
        self._lanes = [lane for lane in self._lanes if lane != gpu]

    def start_missing(self) -> None:
        running = Counter(trainer.gpu for trainer in self._trainers)
        for gpu in self._lanes:
            running[gpu] -= 1
            if running[gpu] < 0:
                self._trainers.append(Trainer(self._start(gpu), self._clock, gpu=gpu))

    def neighbours(self, trainer: Trainer) -> list[Trainer]:
        """Return the other trainers on its card, or on the CPU, that have a job or prove their place."""
        return [
            other
            for other in self._trainers
            if other is not trainer and other.gpu == trainer.gpu and (other.job is not None or other.proves)
        ]

    def of(self, job: Job) -> Trainer | None:
        """Return the trainer that is busy with this claim of the job; None while it is recorded, for example."""
        return next((trainer for trainer in self._trainers if trainer.has(job)), None)

    def remove(self, trainer: Trainer) -> str:
        """Forget a trainer that has ended; return why it did."""
        self._trainers.remove(trainer)
        reason = trainer.process.obituary()
        trainer.process.close()
        return reason


class Suggester(Child):
    """The process that chooses points, with the trainers that wait for one."""

    def __init__(self, process: Pipes, clock: Clock, *, database_url: str) -> None:
        super().__init__(process, clock)
        self._database_url = database_url
        self.waiting: dict[tuple[int, int], tuple[Trainer, Job]] = {}  # by job and fence

    @property
    def owes_answer(self) -> bool:
        return bool(self.waiting)

    def ask(self, trainer: Trainer, job: Job) -> None:
        """Let the sampler choose the job's point."""
        self.last_sign = self._clock.monotonic()
        self.waiting[job.id, job.fence] = (trainer, job)
        request = protocol.Fill(database_url=self._database_url, study=job.study, job=job.id, fence=job.fence)
        self.process.send(request)

    def take(self, job_id: int, fence: int) -> tuple[Trainer, Job] | None:
        """Return the trainer that has waited, free again, and its job; None if it waits no more."""
        trainer, job = self.waiting.pop((job_id, fence), (None, None))
        if trainer is None or job is None or not trainer.has(job):
            return None
        trainer.release()
        return trainer, job
