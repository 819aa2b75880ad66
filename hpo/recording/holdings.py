"""The jobs whose leases a worker holds, and their epochs on the way to the database: what its two threads share."""

import threading
from collections.abc import Sequence
from contextlib import suppress

from hpo import crash
from hpo.queue import Job, LeaseLost, Queue

Epoch = tuple[int, int, dict[str, float]]  # number, milliseconds since 1970, metrics
BATCH = 2000  # epochs that are stored at a time: 0.2 s on a busy machine


class Holdings:
    """Jobs by id and fence: a job given back and claimed again is another holding. Safe to use from both threads."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._jobs: dict[tuple[int, int], Job] = {}
        self._epochs: dict[tuple[int, int], list[Epoch]] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()  # one flush at a time: epochs are removed only once they are stored

    def add(self, job: Job) -> None:
        """Hold a job, or hold it with what has become known of it since."""
        with self._lock:
            self._jobs[job.id, job.fence] = job

    def drop(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop((job.id, job.fence), None)
            self._epochs.pop((job.id, job.fence), None)

    def __contains__(self, job: Job | None) -> bool:
        return job is not None and (job.id, job.fence) in self._jobs

    def jobs(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def put_epoch(self, job: Job, epoch: Epoch) -> None:
        with self._lock:
            self._epochs.setdefault((job.id, job.fence), []).append(epoch)

    def flush(self, job: Job) -> None:
        """Store the epochs of the job that have arrived. Raises DatabaseLost; then they are kept for the next time."""
        while not self._store(job, BATCH, wait=True):
            pass

    def flush_some(self, jobs: Sequence[Job]) -> bool:
        """Store epochs that have arrived, BATCH of them at most, and none while the other thread does; whether that was
        all. For the thread that owns the leases. Raises DatabaseLost."""
        return all([self._store(job, max(1, BATCH // len(jobs)), wait=False) for job in jobs])

    def _store(self, job: Job, most: int, *, wait: bool) -> bool:
        """Store so many epochs; whether none is left."""
        key = (job.id, job.fence)
        if not self._flushing.acquire(blocking=wait):
            return False
        try:
            with self._lock:
                batch = self._epochs.get(key, [])[:most]
            if batch:
                with suppress(LeaseLost):  # the next renewal finds out, and acts on it
                    self._queue.add_epochs(job, batch)
                    crash.at("epochs stored")
            with self._lock:
                left = self._epochs.get(key, [])
                del left[: len(batch)]
                return not left
        finally:
            self._flushing.release()
