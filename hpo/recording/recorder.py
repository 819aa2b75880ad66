"""The threads of a worker that talk to MLflow, so that a slow server never holds up a lease.

Tasks of one job are done in order, each until it succeeds; those of other jobs go on beside them. While the server or
the database is away they wait. What was trained is not thrown away for an error that nobody foresaw, either: its task
is tried again for as long. The threads share nothing with the supervisor's but the list of tasks and the inbox for
their outcomes.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from hpo.errors import disk_is_full
from hpo.queue import AttemptOutcome, DatabaseLost, Job, LeaseLost
from hpo.recording.outage import Outage
from hpo.recording.outcomes import Ended, Inbox, LostLease, NothingRecorded, Outcome, Refused
from hpo.recording.reconcilers import Reconcilers
from hpo.text import first_line
from hpo.tracking.errors import StoreRefuses, TrackingUnavailable

THREADS = 2  # each holds up to two connections to the database
FORWARD_INTERVAL = 15.0  # seconds between two deliveries of a running trial's epochs: each costs the trainers' cores
RECONCILE_INTERVAL = 10.0  # seconds
RETRY_PAUSES = (0.5, 1.0, 2.0, 5.0)  # seconds; the last one repeats
KEPT_PAUSE = 10.0  # seconds between two tries of a task that failed for a reason of its own

log = logging.getLogger("hpo")

Task = Callable[[], Outcome | None]
GiveUp = Callable[[str], Outcome | None]  # ends a job for a reason; itself a task
Key = int | None  # a job by its id, whichever claim; None for the worker itself


def _key(job: Job | None) -> Key:
    return None if job is None else job.id


@dataclass(frozen=True, eq=False)
class _Queued:
    """A task that waits for its turn."""

    job: Job | None
    task: Task
    give_up: GiveUp | None = None


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A result that could not be recorded, and waits to be tried again."""

    job: Job
    task: Task
    give_up: GiveUp
    reason: str
    since: float  # monotonic seconds
    due: float  # likewise


class Recorder:
    """Runs tasks and, between them, sends the epochs of running trials and reconciles what others left half done."""

    def __init__(self, reconcilers: Reconcilers, inbox: Inbox, outage: Outage, *, patience: float) -> None:
        """`patience`: seconds for which a result is kept that cannot be recorded."""
        self._threads = [threading.Thread(target=self._housekeep, name="recorder", daemon=True)]
        self._threads += [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS - 1)]
        self.outage, self.patience = outage, patience
        self._reconcilers, self._inbox = reconcilers, inbox
        self._running: Sequence[Job] = ()  # trials whose epochs are sent; replaced as a whole
        self.may_expire = False  # whether all workers have had the time to renew their leases; the supervisor learns it
        self._kept: dict[tuple[int, int], _Kept] = {}  # by job and fence
        self._refused = defaultdict[str, set[int]](set)  # by study: jobs refused since a result was recorded
        self._unsent: set[int] = set()  # jobs whose epochs could not be sent, and that was said
        self._logged_at = defaultdict[str, float](lambda: float("-inf"))  # by study: the last result; monotonic seconds
        self._tasks: deque[_Queued] = deque()
        self._busy: set[Key] = set()  # whose tasks are being done
        self._retrying: set[Key] = set()  # of these, those that a service refuses at the moment
        self._wake = threading.Condition()
        self._keeping = threading.Lock()  # of what is kept and refused
        self._closing = self._reconcile_last = False
        self._abandon = threading.Event()

    # For the supervisor's thread

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Return whether no thread has ended."""
        return all(thread.is_alive() for thread in self._threads)

    def put(self, job: Job | None, task: Task, give_up: GiveUp | None = None) -> None:
        """Queue a task that may raise TrackingUnavailable, DatabaseLost (both: it is repeated) or LeaseLost.

        `job`: None for a task of the worker itself, which raises nothing else.

        With `give_up` it records what was trained: after another error it is kept and tried again. When the patience is
        over, and it is the trial's own fault, `give_up` is called: results of others could be recorded meanwhile, or
        none of them was refused and MLflow takes what we write at the study. Else all that is kept is posted as
        Refused, then NothingRecorded.
        """
        with self._wake:
            self._tasks.append(_Queued(job, task, give_up))
            self._wake.notify_all()

    def watch(self, trials: Sequence[Job]) -> None:
        """Send the epochs of these trials from now on."""
        self._running = trials

    def note(self, error: Exception) -> None:
        """Remember that a service could not be reached."""
        if isinstance(error, DatabaseLost):
            self.may_expire = False  # until the supervisor has asked again
        self.outage.note(error)

    @property
    def concern(self) -> str | None:
        """What is unreachable now, or which result cannot be recorded, for people."""
        return self.outage.text or next((f"{k.job.title}: {k.reason}" for k in list(self._kept.values())), None)

    def refuses(self, study: str) -> bool:
        """Return whether results of several trials of the study wait, and none was recorded since: so would another."""
        return len(self._refused[study]) > 1 and any(kept.job.study == study for kept in list(self._kept.values()))

    @property
    def idle(self) -> bool:
        """Whether every task that was put is done, and its outcome posted."""
        with self._wake:
            return not self._tasks and not self._busy

    def finish(self, timeout: float, *, reconcile: bool) -> bool:
        """Do what is queued and, if asked, reconcile the study; return whether that ended in `timeout` seconds."""
        with self._wake:
            self._closing, self._reconcile_last = True, reconcile
            self._wake.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._abandon.set()
        return not any(thread.is_alive() for thread in self._threads)

    # In their own threads

    def _work(self, between: Callable[[], None] = lambda: None) -> None:
        """Do tasks until all are done and no more come; call `between` when there is nothing else to do for now."""
        while not self._abandon.is_set():
            with self._wake:
                self._wake.wait_for(lambda: self._next() is not None or (self._closing and self.idle), 0.5)
                queued = self._next()
                if queued is not None:
                    self._tasks.remove(queued)
                    self._busy.add(_key(queued.job))
                elif self._closing and self.idle:
                    return
            if queued is not None:
                self._do(queued)
            elif not self._closing:
                between()

    def _housekeep(self) -> None:
        """Do tasks, and between them whatever is due."""
        next_delivery = next_reconciliation = time.monotonic()

        def between() -> None:
            nonlocal next_delivery, next_reconciliation
            now = time.monotonic()
            if kept := self._next_kept(now):
                self._do(_Queued(kept.job, kept.task, kept.give_up))
            elif now >= next_delivery:
                self._quietly(self._send_epochs)
                next_delivery = time.monotonic() + FORWARD_INTERVAL
            elif now >= next_reconciliation:
                self._quietly(partial(self._reconcilers.reconcile, at_once=False, expire=self.may_expire))
                next_reconciliation = time.monotonic() + RECONCILE_INTERVAL

        self._work(between)
        if self._reconcile_last and not self._abandon.is_set():
            self._quietly(partial(self._reconcilers.reconcile, at_once=True, expire=self.may_expire))

    def _next(self) -> _Queued | None:
        """Return the first task of a job whose earlier ones are done."""
        return next((queued for queued in self._tasks if _key(queued.job) not in self._busy), None)

    def _next_kept(self, now: float) -> _Kept | None:
        """Return a kept result that is due, its job busy from now on."""
        with self._wake:
            waiting = (kept for kept in list(self._kept.values()) if _key(kept.job) not in self._busy)
            if kept := next((kept for kept in waiting if now >= kept.due), None):
                self._busy.add(_key(kept.job))
            return kept

    def _do(self, queued: _Queued) -> None:
        """Do a task until it succeeds, fails or is kept for later; post its outcome."""
        try:
            self._attempt(queued)
        finally:
            self._release(_key(queued.job))

    def _release(self, key: Key) -> None:
        with self._wake:
            self._retrying.discard(key)
            self._busy.discard(key)
            self._wake.notify_all()

    def _attempt(self, queued: _Queued) -> None:
        job, give_up, key, attempt = queued.job, queued.give_up, _key(queued.job), 0
        while not self._abandon.is_set():
            try:
                outcome = queued.task()
                self._retrying.discard(key)
                self._note_answer()
            except (TrackingUnavailable, DatabaseLost) as error:
                if isinstance(error, StoreRefuses) or not disk_is_full(error):
                    self._retrying.add(key)
                    self.note(error)
                    self._abandon.wait(RETRY_PAUSES[min(attempt, len(RETRY_PAUSES) - 1)])
                    attempt += 1
                    continue
                outcome = _failed(job, error)
            except LeaseLost:
                outcome = None if job is None else LostLease(job=job)
            except Exception as error:
                if job is not None and give_up is not None and not disk_is_full(error):
                    with self._keeping:
                        self._keep(job, queued.task, give_up, error)
                    return
                outcome = _failed(job, error)
            with self._keeping:
                if job is not None and give_up is not None:
                    self._kept.pop((job.id, job.fence), None)
                if isinstance(outcome, Ended) and outcome.logged:
                    self._logged_at[outcome.job.study] = time.monotonic()
                    self._refused[outcome.job.study].clear()
            if outcome is not None:
                self._inbox.post(outcome)
            return

    def _note_answer(self) -> None:
        """End the outage unless another thread still meets it."""
        if not self._retrying:
            self.outage.over()

    def _keep(self, job: Job, task: Task, give_up: GiveUp, error: Exception) -> None:
        """Try the task again later, or give the result up."""
        now, reason = time.monotonic(), f"its result cannot be recorded: {first_line(error)}"
        before = self._kept.get((job.id, job.fence))
        since = before.since if before is not None else now
        if before is None:
            self._refused[job.study].add(job.id)
            log.warning("%s: %s. It is kept and tried again for %.0f s.", job.title, reason, self.patience)
            log.debug("", exc_info=True)
            with suppress(LeaseLost, DatabaseLost):  # for people: the next try finds out
                self._reconcilers.queue.note(job, reason)
        kept = _Kept(job=job, task=task, give_up=give_up, reason=reason, since=since, due=now + KEPT_PAUSE)
        self._kept[job.id, job.fence] = kept
        if now - since < self.patience:
            return
        try:
            is_alone = len(self._refused[job.study]) == 1
            own_fault = self._logged_at[job.study] > since or (is_alone and self._reconcilers.takes(job))
        except (TrackingUnavailable, DatabaseLost) as away:
            self.note(away)  # that says nothing of either: look again at the next try
            return
        if own_fault:
            del self._kept[job.id, job.fence]
            self.put(job, partial(give_up, reason))
            return
        for kept in [kept for kept in self._kept.values() if kept.job.study == job.study]:
            self._inbox.post(Refused(job=kept.job, reason=kept.reason, attempt=AttemptOutcome.PLACE_FAILED))
            del self._kept[kept.job.id, kept.job.fence]
        self._inbox.post(NothingRecorded(study=job.study, reason=f"{job.title}: {reason}"))

    def _quietly(self, work: Callable[[], int]) -> None:
        """Do housekeeping that is simply tried again the next time; `work` returns how much it got done."""
        try:
            if work() or (self.outage.text and self._reconcilers.answers()):
                self._note_answer()
        except (TrackingUnavailable, DatabaseLost) as error:
            self.note(error)
        except Exception as error:
            log.warning("housekeeping failed, it is tried again: %s", first_line(error))
            log.debug("", exc_info=True)

    def _send_epochs(self) -> int:
        """Send the epochs of running trials to MLflow, and those that count to Optuna; return the number."""
        count = 0
        for job in self._running:
            reconciler = self._reconcilers.of(job)
            with self._wake:
                if reconciler is None or _key(job) in self._busy:  # its epochs are sent by its task
                    continue
                self._busy.add(_key(job))
            try:
                if (current := self._reconcilers.queue.job(job.id)) is None:
                    continue
                reconciler.update_judged(current)
                if current.run_id is not None:
                    count += reconciler.send_epochs(current, current.run_id)
            except (TrackingUnavailable, DatabaseLost):
                raise
            except Exception as error:  # such as a run somebody deleted: the others still want their epochs
                if job.id not in self._unsent:
                    self._unsent.add(job.id)
                    log.warning("epochs of %s cannot be shown in MLflow or Optuna: %s", job.title, first_line(error))
                    log.debug("", exc_info=True)
            finally:
                self._release(_key(job))
        return count


def _failed(job: Job | None, error: Exception) -> Refused | None:
    full, reason = disk_is_full(error), first_line(error)
    log.debug("", exc_info=True)
    if job is None:
        log.warning("%s", reason)
        return None
    log.warning("%s could not be recorded: %s", job.title, reason)
    if full:
        reason = f"no room on the disk ({reason})"
        return Refused(job=job, reason=reason, attempt=AttemptOutcome.HANDED_BACK, disk_full=True)
    return Refused(job=job, reason=reason, attempt=AttemptOutcome.FAILED)
