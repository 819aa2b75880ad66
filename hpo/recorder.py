"""The one thread of a worker that talks to MLflow, so that a slow server never holds up a lease.

Tasks are done in order, each until it succeeds; while the server or the database is away they wait.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from hpo.mirror import Mirror, first_line, title
from hpo.queue import DatabaseLost, Job, LeaseLost
from hpo.tracking import TrackingUnavailable

FORWARD_INTERVAL = 15.0  # seconds between two deliveries of a running trial's epochs: each costs the trainers' cores
RECONCILE_INTERVAL = 10.0  # seconds
RETRY_PAUSES = (0.5, 1.0, 2.0, 5.0)  # seconds; the last one repeats

log = logging.getLogger("hpo")


class Recorder(threading.Thread):
    """Runs tasks and, between them, forwards epochs of the jobs in `live` and mends what others left half done."""

    def __init__(self, mirror: Mirror, *, lease: float) -> None:
        super().__init__(name="recorder", daemon=True)
        self.mirror, self.lease = mirror, lease
        self.live: list[Job] = []  # jobs whose epochs we forward; replaced as a whole by the supervisor
        self.trouble: str | None = None  # what is unreachable now
        self._trouble_since = 0.0  # monotonic seconds
        self.lost: deque[Job] = deque()  # jobs whose lease was found lost
        self.failures: deque[tuple[Job, str]] = deque()  # tasks that can never succeed
        self._tasks: deque[tuple[Job, Callable[[], None]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._abandon = threading.Event()

    def put(self, job: Job, task: Callable[[], None]) -> None:
        """Queue a task that may raise TrackingUnavailable, DatabaseLost (both: it is repeated) or LeaseLost."""
        with self._wake:
            self._tasks.append((job, task))
            self._wake.notify()

    @property
    def outage(self) -> float:
        """Seconds since MLflow or the database was last reached; 0 when nothing is wrong."""
        return time.monotonic() - self._trouble_since if self.trouble else 0.0

    @property
    def idle(self) -> bool:
        return not self._tasks

    def finish(self, timeout: float) -> bool:
        """Do what is queued, then end; whether all was done within `timeout` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self.join(timeout)
        self._abandon.set()
        return not self._tasks

    def run(self) -> None:
        next_forward = next_reconcile = time.monotonic()
        while True:
            with self._wake:
                if not self._tasks and not self._closing:
                    self._wake.wait(0.5)
                task = self._tasks[0] if self._tasks else None
                if task is None and self._closing:
                    return
            if task is not None:
                self._do(*task)
                self._tasks.popleft()
            elif time.monotonic() >= next_forward:
                self._quietly(self._forward)
                next_forward = time.monotonic() + FORWARD_INTERVAL
            elif time.monotonic() >= next_reconcile:
                self._quietly(lambda: self.mirror.reconcile(older_than=self.lease))
                next_reconcile = time.monotonic() + RECONCILE_INTERVAL
            if self._abandon.is_set():
                return

    def _do(self, job: Job, task: Callable[[], None]) -> None:
        attempt = 0
        while not self._abandon.is_set():
            try:
                task()
                self.trouble = None
                return
            except (TrackingUnavailable, DatabaseLost) as error:
                self.note(error)
                self._abandon.wait(RETRY_PAUSES[min(attempt, len(RETRY_PAUSES) - 1)])
                attempt += 1
            except LeaseLost:
                self.lost.append(job)
                return
            except Exception as error:
                log.warning("%s could not be recorded: %s", title(job), first_line(error))
                log.debug("", exc_info=True)
                self.failures.append((job, first_line(error)))
                return

    def _quietly(self, work: Callable[[], int]) -> None:
        """Housekeeping that is simply tried again the next time; `work` returns how much it got done."""
        try:
            if work() or (self.trouble and self.mirror.answers()):
                self.trouble = None
        except (TrackingUnavailable, DatabaseLost) as error:
            self.note(error)
        except Exception as error:
            log.warning("housekeeping failed, it is tried again: %s", first_line(error))
            log.debug("", exc_info=True)

    def _forward(self) -> int:
        count = 0
        for job in self.live:
            current = self.mirror.queue.job(job.id)
            if current is not None and current.run_id is not None:
                count += self.mirror.forward(current, current.run_id)
        return count

    def note(self, error: Exception) -> None:
        """Remember that a service could not be reached."""
        if self.trouble is None:
            self._trouble_since = time.monotonic()
        what = "MLflow unreachable" if isinstance(error, TrackingUnavailable) else "database lost"
        self.trouble = f"{what}, retrying"
        log.warning("%s: %s", self.trouble, first_line(error))
