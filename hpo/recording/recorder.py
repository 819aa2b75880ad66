"""The one thread of a worker that talks to MLflow, so that a slow server never holds up a lease.

Tasks are done in order, each until it succeeds; while the server or the database is away they wait. What was trained is
not thrown away for an error nobody foresaw, either: its task is tried again beside the others for as long.
"""

import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpo.errors import disk_is_full
from hpo.queue import DatabaseLost, Job, LeaseLost
from hpo.recording.reconciler import Mirror
from hpo.text import first_line
from hpo.tracking.client import Refused, StoreRefuses, TrackingUnavailable

FORWARD_INTERVAL = 15.0  # seconds between two deliveries of a running trial's epochs: each costs the trainers' cores
RECONCILE_INTERVAL = 10.0  # seconds
REMINDER = 60.0  # seconds between two log lines about the same outage
RETRY_PAUSES = (0.5, 1.0, 2.0, 5.0)  # seconds; the last one repeats
KEPT_PAUSE = 10.0  # seconds between two tries of a task that failed for a reason of its own

log = logging.getLogger("hpo")

Task = Callable[[], object]
GiveUp = Callable[[str], None]  # ends a job for a reason; itself a task


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A result that could not be recorded, and waits to be tried again."""

    job: Job
    task: Task
    give_up: GiveUp
    reason: str
    since: float  # monotonic seconds
    due: float  # likewise


class Recorder(threading.Thread):
    """Runs tasks and, between them, forwards epochs of the jobs in `live` and mends what others left half done."""

    def __init__(self, mirror: Mirror, *, lease: float, patience: float, store: Path | None = None) -> None:
        """`patience`: seconds for which a result is kept that cannot be recorded. `store`: the artifact store's folder,
        if it is on this machine."""
        super().__init__(name="recorder", daemon=True)
        self.mirror, self.lease, self.patience, self.store = mirror, lease, patience, store
        self.live: list[Job] = []  # jobs whose epochs we forward; replaced as a whole by the supervisor
        self.trouble: str | None = None  # what is unreachable now, for people
        self.store_full = False
        self.calm = False  # whether everybody has had the time to renew their leases; the supervisor learns it
        self._trouble_since = self._said_at = 0.0  # monotonic seconds
        self._causes: set[type] = set()  # errors of the database that were said in this trouble
        self.lost: deque[Job] = deque()  # jobs whose lease was found lost
        self.failures: deque[tuple[Job, str, bool]] = deque()  # tasks that failed, and whether for a full disk here
        self.stuck: str | None = None  # why no result can be recorded: the worker should leave
        self._kept: dict[tuple[int, int], _Kept] = {}  # by job and fence
        self._refused: set[int] = set()  # jobs whose results were refused since one was recorded
        self._unshown: set[int] = set()  # jobs whose epochs could not be delivered, and that was said
        self._recorded = float("-inf")  # when a result was recorded last; monotonic seconds
        self._tasks: deque[tuple[Job, Task, GiveUp | None]] = deque()
        self._wake = threading.Condition()
        self._closing = self._tidy = False
        self._abandon = threading.Event()

    def put(self, job: Job, task: Task, give_up: GiveUp | None = None) -> None:
        """Queue a task that may raise TrackingUnavailable, DatabaseLost (both: it is repeated) or LeaseLost.

        With `give_up` it records what was trained, and returns whether MLflow was asked to: after another error it is
        kept and tried again. When its patience is over, and it is the trial's own fault, `give_up` is called: results
        of others could be recorded meanwhile, or none of them was refused and MLflow takes what we write at the study.
        Else `stuck` says why, and all that is kept is among the `failures`.
        """
        with self._wake:
            self._tasks.append((job, task, give_up))
            self._wake.notify()

    @property
    def concern(self) -> str | None:
        """What is unreachable now, or which result cannot be recorded, for people."""
        return self.trouble or next((f"{each.job.title}: {each.reason}" for each in list(self._kept.values())), None)

    @property
    def refusing(self) -> bool:
        """Whether results of more than one trial wait, and none has been recorded since: the next one would, too."""
        return len(self._refused) > 1 and bool(self._kept)

    @property
    def outage(self) -> float:
        """Seconds since MLflow or the database was last reached; 0 when nothing is wrong."""
        return time.monotonic() - self._trouble_since if self.trouble else 0.0

    @property
    def idle(self) -> bool:
        return not self._tasks

    def finish(self, timeout: float, *, tidy: bool) -> bool:
        """Do what is queued and, if `tidy`, mend what is left; then end. Whether it ended within `timeout` seconds."""
        with self._wake:
            self._closing, self._tidy = True, tidy
            self._wake.notify()
        self.join(timeout)
        self._abandon.set()
        return not self.is_alive()

    def run(self) -> None:
        next_forward = next_reconcile = time.monotonic()
        while True:
            with self._wake:
                if not self._tasks and not self._closing:
                    self._wake.wait(0.5)
                task = self._tasks[0] if self._tasks else None
            if task is None and self._closing:
                if self._tidy:
                    self._quietly(lambda: self.mirror.reconcile(lease=self.lease, older_than=0, expire=self.calm))
                return
            if task is not None:
                self._do(*task)
                self._tasks.popleft()
            elif kept := next((each for each in self._kept.values() if time.monotonic() >= each.due), None):
                self._do(kept.job, kept.task, kept.give_up)
            elif time.monotonic() >= next_forward:
                self._quietly(self._forward)
                next_forward = time.monotonic() + FORWARD_INTERVAL
            elif time.monotonic() >= next_reconcile:
                self._quietly(lambda: self.mirror.reconcile(lease=self.lease, older_than=self.lease, expire=self.calm))
                next_reconcile = time.monotonic() + RECONCILE_INTERVAL
            if self._abandon.is_set():
                return

    def _do(self, job: Job, task: Task, give_up: GiveUp | None) -> None:
        attempt = 0
        while not self._abandon.is_set():
            try:
                recorded = task()
                self._well()
                if give_up and recorded:
                    self._recorded = time.monotonic()
                    self._refused.clear()
            except (TrackingUnavailable, DatabaseLost) as error:
                if isinstance(error, StoreRefuses) or not disk_is_full(error):
                    self.note(error)
                    self._abandon.wait(RETRY_PAUSES[min(attempt, len(RETRY_PAUSES) - 1)])
                    attempt += 1
                    continue
                self._fail(job, error, full=True)
            except LeaseLost:
                self.lost.append(job)
            except Exception as error:
                if give_up is not None and not disk_is_full(error):
                    self._keep(job, task, give_up, error)
                    return
                self._fail(job, error, full=disk_is_full(error))
            if give_up is not None:
                self._kept.pop((job.id, job.fence), None)
            return

    def _keep(self, job: Job, task: Task, give_up: GiveUp, error: Exception) -> None:
        """Try the task again later, or give the result up."""
        now, reason = time.monotonic(), f"its result cannot be recorded: {first_line(error)}"
        before = self._kept.get((job.id, job.fence))
        since = before.since if before is not None else now
        if before is None:
            self._refused.add(job.id)
            log.warning("%s: %s. It is kept and tried again for %.0f s.", job.title, reason, self.patience)
            log.debug("", exc_info=True)
            with suppress(LeaseLost, DatabaseLost):  # for people: the next try finds out
                self.mirror.queue.note(job, reason)
        self._kept[job.id, job.fence] = _Kept(
            job=job, task=task, give_up=give_up, reason=reason, since=since, due=now + KEPT_PAUSE
        )
        if now - since < self.patience:
            return
        try:
            own_fault = self._recorded > since or (len(self._refused) == 1 and self.mirror.takes())
        except (TrackingUnavailable, DatabaseLost) as away:
            self.note(away)  # that says nothing of either: look again at the next try
            return
        if own_fault:
            del self._kept[job.id, job.fence]
            self.put(job, partial(give_up, reason))
            return
        self.stuck = f"{job.title}: {reason}"
        for each in self._kept.values():
            self.failures.append((each.job, each.reason, False))
        self._kept = {}

    def _fail(self, job: Job, error: Exception, *, full: bool) -> None:
        log.warning("%s could not be recorded: %s", job.title, first_line(error))
        log.debug("", exc_info=True)
        reason = f"no room on the disk ({first_line(error)})" if full else first_line(error)
        self.failures.append((job, reason, full))

    def _quietly(self, work: Callable[[], int]) -> None:
        """Housekeeping that is simply tried again the next time; `work` returns how much it got done."""
        try:
            if work() or (self.trouble and self.mirror.answers()):
                self._well()
        except (TrackingUnavailable, DatabaseLost) as error:
            self.note(error)
        except Exception as error:
            log.warning("housekeeping failed, it is tried again: %s", first_line(error))
            log.debug("", exc_info=True)

    def _forward(self) -> int:
        count = 0
        for job in self.live:
            current = self.mirror.queue.job(job.id)
            if current is None:
                continue
            try:
                self.mirror.show_judged(current)
                if current.run_id is not None:
                    count += self.mirror.forward(current, current.run_id)
            except (TrackingUnavailable, DatabaseLost):
                raise
            except Exception as error:  # such as a run somebody deleted: the others still want their epochs
                if job.id not in self._unshown:
                    self._unshown.add(job.id)
                    log.warning("epochs of %s cannot be shown in MLflow or Optuna: %s", job.title, first_line(error))
                    log.debug("", exc_info=True)
        return count

    def note(self, error: Exception) -> None:
        """Remember that a service could not be reached, and say so: at once, then once a minute; of a database also
        when another cause comes up: a connection is dropped, say, and then nothing may be written."""
        now = time.monotonic()
        if self.trouble is None:
            self._trouble_since, self._said_at = now, float("-inf")
            self._causes.clear()
        if isinstance(error, DatabaseLost):
            self.calm = False  # until the supervisor has asked again
            cause = type(getattr(error.__cause__, "orig", None))
            if cause not in self._causes:
                self._causes.add(cause)
                self._said_at = float("-inf")
        if isinstance(error, TrackingUnavailable):  # of the store a lost database tells nothing
            if self.store_full != isinstance(error, StoreRefuses):
                self._said_at = float("-inf")
            self.store_full = isinstance(error, StoreRefuses)
        self.trouble = self._words(error)
        if now - self._said_at >= REMINDER:
            self._said_at = now
            log.warning("%s (%s)", self.trouble, first_line(error))

    def _well(self) -> None:
        if self.trouble is not None:
            log.warning("all services answer again, after %.0f s", self.outage)
        self.trouble, self.store_full = None, False

    def _words(self, error: Exception) -> str:
        if isinstance(error, StoreRefuses):
            return f"{self._store_words(error.needed / 1e6)}; no trial is claimed until it takes files again"
        if isinstance(error, DatabaseLost):
            return "database lost, retrying"
        waiting = ""
        with suppress(DatabaseLost):
            waiting = f", {self.mirror.queue.waiting_epochs(self.mirror.study.name)} epochs waiting"
        return f"MLflow {error.answer if isinstance(error, Refused) else 'unreachable'}{waiting}"

    def _store_words(self, needed: float) -> str:
        """`needed` in MB."""
        if self.store is None:
            return f"the MLflow server stores no files (full or read-only?): {needed:.1f} MB needed"
        if not os.access(self.store, os.W_OK):
            return f"store read-only: {needed:.1f} MB needed in {self.store}"
        free = shutil.disk_usage(self.store).free / 1e6
        if free < needed + 1:
            return f"store full: {needed:.1f} MB needed, {free:.1f} MB free in {self.store}"
        return f"the MLflow server stores no files in {self.store}: {needed:.1f} MB needed, {free:.1f} MB free"
