"""The jobs whose leases a worker holds, and their epochs on the way to the database: what its two threads share."""

import threading
from contextlib import suppress

from hpo import crash
from hpo.queue import Job, LeaseLost, Queue

Epoch = tuple[int, int, dict[str, float]]  # number, milliseconds since 1970, metrics


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

    def flush(self, only: Job | None = None) -> None:
        """Store the epochs that have arrived. Raises DatabaseLost; then they are kept for the next time."""
        with self._flushing:
            for job in self.jobs() if only is None else [only]:
                with self._lock:
                    batch = list(self._epochs.get((job.id, job.fence), ()))
                if not batch:
                    continue
                with suppress(LeaseLost):  # the next renewal finds out, and acts on it
                    self._queue.add_epochs(job, batch)
                    crash.at("epochs stored")
                with self._lock:
                    del self._epochs.get((job.id, job.fence), [])[: len(batch)]
