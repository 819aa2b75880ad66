"""The reconcilers of a worker's studies, as its recorder uses them."""

from hpo.queue import Job, Queue
from hpo.recording.reconciler import Reconciler


class Reconcilers:
    """One reconciler for each study that a worker serves. Methods may raise TrackingUnavailable or DatabaseLost."""

    def __init__(self, queue: Queue, *, lease: float) -> None:
        """`lease` in seconds."""
        self.queue, self.lease = queue, lease
        self._by_study: dict[str, Reconciler] = {}

    def add(self, reconciler: Reconciler) -> None:
        """Serve another study, or one that was planned again."""
        self._by_study = self._by_study | {reconciler.study.name: reconciler}  # another thread may be reading

    def remove(self, study: str) -> None:
        """Serve a study no longer."""
        self._by_study = {name: reconciler for name, reconciler in self._by_study.items() if name != study}

    def of(self, job: Job) -> Reconciler | None:
        """Return the reconciler of the job's study, if that is served still."""
        return self._by_study.get(job.study)

    def answers(self) -> bool:
        """Return True if the database answers, and the tracking server if a study is served; raise otherwise."""
        served = next(iter(self._by_study.values()), None)
        return self.queue.installed() if served is None else served.answers()

    def takes(self, job: Job) -> bool:
        """Return whether the tracking server takes something harmless of the job's study."""
        served = self.of(job)
        return served is not None and served.takes()

    def reconcile(self, *, at_once: bool, expire: bool) -> int:
        """Reconcile what other workers left half done, `at_once` or for a lease; return the number of jobs."""
        studies, older_than = self._by_study.values(), 0.0 if at_once else self.lease
        return sum(study.reconcile(lease=self.lease, older_than=older_than, expire=expire) for study in studies)
