"""The jobs that a worker holds, what its trainers have sent of them, and their way back to the queue.

Owned by the supervisor's thread. A job given back and claimed again is another one: jobs are known by id and fence.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, takewhile

from hpo import crash
from hpo.queue import AttemptOutcome, Job, LeaseLost, Queue
from hpo.recording.recorder import GiveUp, Recorder, Task

BATCH = 2000  # epochs that are stored at a time: 0.2 s on a busy machine

Epoch = tuple[int, int, dict[str, float]]  # number, milliseconds since 1970, metrics


@dataclass(frozen=True)
class _Next:
    """A task for the recorder that needs the epochs before it in the database."""

    task: Task
    give_up: GiveUp | None
    trained: str | None  # what its trainer said of a finished training: stored before the task


@dataclass
class _Held:
    job: Job
    backlog: deque[Epoch | _Next] = field(default_factory=deque)  # in the order of arrival


@dataclass(frozen=True)
class _Return:
    """A job on its way back to the queue."""

    job: Job
    reason: str
    outcome: AttemptOutcome
    alone: bool  # it had its card or host for itself


class Leases:
    """Jobs held by this worker, each with the epochs and tasks that wait for the database."""

    def __init__(self, queue: Queue, recorder: Recorder, *, discard: Callable[[Job], None]) -> None:
        """`discard` removes the local files of a job that is held no longer."""
        self._queue, self._recorder, self._discard = queue, recorder, discard
        self._held: dict[tuple[int, int], _Held] = {}
        self._returning: deque[_Return] = deque()

    def hold(self, job: Job) -> None:
        """Hold a job, or replace what is known of a held one."""
        key = (job.id, job.fence)
        self._held[key] = _Held(job, self._held[key].backlog if key in self._held else deque())

    def drop(self, job: Job) -> None:
        """Hold a job no longer, and forget what waits of it."""
        self._held.pop((job.id, job.fence), None)
        self._discard(job)

    def __contains__(self, job: Job | None) -> bool:
        return job is not None and (job.id, job.fence) in self._held

    @property
    def jobs(self) -> list[Job]:
        return [held.job for held in self._held.values()]

    @property
    def trials(self) -> list[Job]:
        return [job for job in self.jobs if job.kind == "trial"]

    def renew(self, *, lease: float) -> list[Job]:
        """Renew all leases for `lease` seconds; return the jobs that are held by others now."""
        return self._queue.renew(self.jobs, lease=lease)

    # Epochs, and tasks that need them stored

    def put_epoch(self, job: Job, epoch: Epoch) -> None:
        self._held[job.id, job.fence].backlog.append(epoch)

    def put_task(self, job: Job, task: Task, give_up: GiveUp | None = None, *, trained: str | None = None) -> None:
        """Give the recorder a task once all epochs of the job that have arrived before it are stored, and `trained`.

        That is what its trainer said of a finished training.
        """
        held = self._held.get((job.id, job.fence))
        if held is not None and (held.backlog or trained is not None):
            held.backlog.append(_Next(task, give_up, trained))
        else:
            self._recorder.put(job, task, give_up)

    @property
    def has_waiting_tasks(self) -> bool:
        return any(isinstance(held.backlog[-1], _Next) for held in self._held.values() if held.backlog)

    def flush(self) -> bool:
        """Store epochs that have arrived, BATCH of them at most; return whether that was all. Raise DatabaseLost.

        Epochs that could not be stored are kept for the next time.
        """
        most = max(1, BATCH // max(1, len(self._held)))
        return all([self._flush(held, most) for held in list(self._held.values())])

    def _flush(self, held: _Held, most: int) -> bool:
        backlog = held.backlog
        while backlog and (most > 0 or isinstance(backlog[0], _Next)):
            if isinstance(first := backlog[0], _Next):
                if first.trained is not None:
                    with suppress(LeaseLost):
                        self._queue.set_trained(held.job, first.trained)
                        crash.at("training stored")
                backlog.popleft()
                self._recorder.put(held.job, first.task, first.give_up)
                continue
            epochs = takewhile(lambda item: not isinstance(item, _Next), backlog)
            batch = [item for item in islice(epochs, most) if not isinstance(item, _Next)]
            with suppress(LeaseLost):  # the next renewal finds out, and acts on it
                self._queue.add_epochs(held.job, batch)
                crash.at("epochs stored")
            for _ in batch:
                backlog.popleft()
            most -= len(batch)
        return not backlog

    # The way back

    def return_soon(
        self, job: Job, reason: str, outcome: AttemptOutcome = AttemptOutcome.HANDED_BACK, *, alone: bool = True
    ) -> None:
        """Return the job to the queue with the next `give_back`; `alone`: it had its card or host for itself."""
        self._returning.append(_Return(job, reason, outcome, alone))

    def is_returning(self, job: Job) -> bool:
        return any((item.job.id, item.job.fence) == (job.id, job.fence) for item in self._returning)

    @property
    def settled(self) -> bool:
        """Whether nothing waits for the database any more."""
        return not self._returning and not any(held.backlog for held in self._held.values())

    def give_back(self) -> Iterator[Job]:
        """Return jobs to the queue; yield those that went. The others wait for the next turn. Raise DatabaseLost."""
        while self._returning:
            item = self._returning[0]
            held = self._held.get((item.job.id, item.job.fence))
            if held is not None:
                if not self._flush(held, BATCH):
                    return
                with suppress(LeaseLost):
                    self._queue.give_back(item.job, item.outcome, reason=item.reason, alone=item.alone)
                self.drop(item.job)
            self._returning.popleft()
            if held is not None:
                yield item.job

    def give_all_back(self, reason: str) -> None:
        """Return everything that is still held to the queue; no attempt is counted. Raise DatabaseLost."""
        for held in list(self._held.values()):
            while not self._flush(held, BATCH):
                pass
            with suppress(LeaseLost):
                self._queue.give_back(held.job, AttemptOutcome.HANDED_BACK, reason=reason)
