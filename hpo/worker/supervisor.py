"""The supervisor: claims jobs, hands them to trainers, renews leases, gives back what cannot be finished.

Torch-free, and one thread: it owns leases, trainers and everything else here, and nothing that it does grows with the
work there is. Two threads talk to MLflow (`hpo.recording.recorder`) and post outcomes to an inbox, another one judges
epochs (`hpo.search.pruning`), and a process chooses points (`hpo.worker.suggester`).
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from hpo.errors import ServiceError
from hpo.queue import DatabaseLost, Job, State, Stop
from hpo.recording import outcomes
from hpo.worker.claims import Claims
from hpo.worker.collaborators import Collaborators
from hpo.worker.crew import Crew
from hpo.worker.ending import NO_LIMITS, OUT_OF_TIME, Ending, Limits
from hpo.worker.leases import Leases

TICK = 0.25  # seconds between two looks at the clock
FLUSH_INTERVAL = 1.0  # seconds an epoch may wait for the database
NOTHING_RECORDED = (
    "No result can be recorded any more. {reason}. Everything is given back, and no attempt counts. When the cause is "
    "gone, the same command goes on; if it is this trial alone, `hpo cancel` lets its study close without it."
)

log = logging.getLogger("hpo")


class Supervisor:
    """One worker. `run` returns when its study is closed, when stopped, or at a limit."""

    def __init__(self, worker: str, parts: Collaborators, ending: Ending, *, limits: Limits = NO_LIMITS) -> None:
        """`worker`: its name in the queue."""
        self.ending = ending
        self._studies, self._worker, self._settings, self._folder = parts.studies, worker, parts.settings, parts.folder
        self._stops = parts.stops
        self._queue, self._recorder = parts.queue, parts.recorder
        self._inbox, self._clock = parts.inbox, parts.clock
        self.leases = Leases(parts.queue, parts.recorder, discard=parts.folder.discard)
        self._crew = Crew(parts, self.leases, self.ending)
        self.claims = Claims(worker, parts, self.leases, self._crew, limits)
        trials, closings = self._crew.trials, self._crew.closings
        self._acts: dict[type[outcomes.Outcome], Callable[[Any], None]] = {
            outcomes.Ended: self._on_ended,
            outcomes.Fetched: trials.on_fetched,
            outcomes.Winners: closings.on_winners,
            outcomes.HandedBack: self._on_handed_back,
            outcomes.LostLease: lambda outcome: self._lost(outcome.job),
            outcomes.Refused: trials.on_refused,
            outcomes.NothingRecorded: self._on_nothing_recorded,
            outcomes.DataFetched: trials.on_data,
            outcomes.NoData: trials.on_data,
            outcomes.StoreProved: trials.proofs.on_store,
            outcomes.NoStore: trials.proofs.on_store,
            outcomes.Opened: self._on_opened,
        }
        for served in self._studies.active:
            trials.proofs.begin_store(served.row.name)
        self._outcomes: deque[outcomes.Outcome] = deque()  # taken from the inbox
        self._unsure = False  # whether a claim may have been made that we never heard of
        self._began = parts.clock.monotonic()
        self._next_renewal = self._next_flush = 0.0

    def run(self, on_tick: Callable[["Supervisor"], None] = lambda supervisor: None) -> bool:
        """Work until the study is closed; return whether it is. Raise ServiceError if nothing can be done here."""
        try:
            while (is_closed := self.step()) is None:
                on_tick(self)
            if self.ending.error is not None:
                raise self.ending.error
            return is_closed
        finally:
            self._leave()

    @property
    def concern(self) -> str | None:
        """What people should know now: that it stops, what it cannot reach, or which result cannot be recorded."""
        if self.ending.reason:
            return f"stopping ({self.ending.reason}): giving trials back"
        return self._recorder.concern or (f"paused: {self.claims.pause}" if self.claims.pause else None)

    @property
    def failed_gpus(self) -> Mapping[str, str]:
        """Why each GPU trains no more, though others do."""
        return self._crew.trials.proofs.failed

    def step(self) -> bool | None:
        """Act on what has arrived and what is due; return whether the study is closed if the work ends, else None."""
        if self._crew.listen(TICK):
            self.claims.soon()  # a trainer may be free
        try:
            return self._turn(self._clock.monotonic())
        except DatabaseLost as error:
            self._unsure, self.claims.idle_since = True, None
            self._recorder.note(error)
            if self.ending.is_over:
                return False
            self._clock.sleep(TICK)
            return None

    def _turn(self, now: float) -> bool | None:
        self._outcomes.extend(self._inbox.take())
        while self._outcomes:
            self.ending.attempt(self._acts[type(self._outcomes[0])], self._outcomes[0])
            self._outcomes.popleft()  # now that no lost database has interrupted it
            self.claims.soon()
        if not self._recorder.is_alive():
            raise ServiceError("The thread that records results has ended unexpectedly. The same command goes on.")
        if self._unsure:
            self._queue.disown(self._worker, self.leases.jobs)
            self._unsure = False
        if now >= self._next_renewal:  # before anything is written of jobs that may be lost
            self._renew()
            self._next_renewal = now + self._settings.lease / 6
        is_due = now >= self._next_flush
        if (is_due or self.leases.has_waiting_tasks) and self.leases.flush():
            self._next_flush = now + FLUSH_INTERVAL
        if is_due:
            self._obey()
            for served in self._studies.active:
                served.pruning.look([job for job in self.leases.trials if job.study == served.row.name])
        self._recorder.watch(self.leases.trials)
        for job in self.leases.give_back():
            self._recorder.put(job, partial(self._studies[job.study].tasks.reconcile, job))
            self.claims.soon()
        self._crew.look_after()
        if self.ending.reason is not None:
            return False if self._is_stopped() else None
        if self.claims.limits.seconds is not None and now - self._began > self.claims.limits.seconds:
            self.ending.stop(OUT_OF_TIME)
            return None
        return self.claims.look(now)

    def _renew(self) -> None:
        """Renew the leases, say that we are here, and learn whether expired leases may be taken over."""
        for job in self.leases.renew(lease=self._settings.lease):
            self._lost(job)
        self._recorder.may_expire = self._queue.attend(
            self._worker,
            self._studies.name,
            trainers=self._crew.trainers.count,
            device=self._crew.device,
            stops=sum(served.row.stops for served in self._studies.active) if self._studies.name else self._stops,
            lease=self._settings.lease,
        )
        self._folder.touch()

    def _lost(self, job: Job) -> None:
        """Stop a job whose row is not held by this claim any more, and write nothing more of it."""
        if job not in self.leases:
            return
        current = self._queue.job(job.id)
        is_cancelled = current is not None and current.state == State.CANCELLED
        if is_cancelled:  # shown after what is being recorded of it right now
            self._recorder.put(job, partial(self._studies[job.study].tasks.reconcile, job))
        own_end = current and current.fence == job.fence and current.state in (State.DONE, State.DIVERGED, State.PRUNED)
        if own_end or self.leases.is_returning(job):  # it went by our own hand, and only the answer was lost
            self.leases.drop(job)
            return
        self._crew.trials.lose(job, str(current.reason) if current and is_cancelled else "lost its lease")
        self.claims.soon()

    def _obey(self) -> None:
        """Do what people ask: leave, leave a study, drop cancelled trials."""
        stops = {served.row.name: served.row.stops for served in self._studies.active}
        orders = self._queue.orders(self._worker, stops=stops, held=self.leases.jobs)
        for job in orders.cancelled:
            self._lost(job)
        for study, stop in orders.stopped.items():
            if study in self._studies.leaving or self.ending.reason is not None:
                continue
            log.warning("%s asked the workers of %s to stop: giving trials back", stop.by, study)
            if not self._studies.stop(study, stop.how):
                self._leave_for(stop)
        if orders.leave is not None and self.ending.reason is None:
            log.warning("%s asked the workers of the pool to stop: giving trials back", orders.leave.by)
            self._leave_for(orders.leave)

    def _leave_for(self, stop: Stop) -> None:
        self.ending.asked = stop
        self.ending.stop(stop.how)

    # Outcomes of the recorder

    def _on_opened(self, outcome: outcomes.Opened) -> None:
        if outcome.error is None:
            self._crew.trials.proofs.stores.add(outcome.study)
        self._studies.on_opened(outcome.study, outcome.error)

    def _on_ended(self, outcome: outcomes.Ended) -> None:
        self.leases.drop(outcome.job)
        self._studies.recorded(outcome.job.study)
        self._recorder.put(outcome.job, partial(self._studies[outcome.job.study].tasks.reconcile, outcome.job))

    def _on_handed_back(self, outcome: outcomes.HandedBack) -> None:
        trainer = self._crew.trainers.of(outcome.job)
        if outcome.job.kind == "closing" and trainer is not None:  # which was kept for it
            trainer.release()
        self.leases.return_soon(outcome.job, outcome.reason)

    def _on_nothing_recorded(self, outcome: outcomes.NothingRecorded) -> None:
        self._studies.fail(outcome.study, NOTHING_RECORDED.format(reason=outcome.reason))

    # The end

    def _is_stopped(self) -> bool:
        """Ask busy trainers for their state once; return whether all is given back or time is up."""
        is_busy = self._crew.call_in()
        is_settled = self._recorder.idle and self._inbox.empty and self.leases.settled
        return self.ending.is_late or (not is_busy and is_settled)

    def _leave(self) -> None:
        """End trainers and recorder; what is still held goes back to the queue from its newest stored checkpoint."""
        self._crew.kill()  # busy ones have handed back what they could, the others have nothing to lose
        if self._recorder.finish(self.ending.seconds_left, reconcile=self.ending.reason is None):
            self._inbox.close()
        for served in self._studies.active:
            served.pruning.finish(0.2)
        with suppress(DatabaseLost):  # then the leases run out
            self.leases.give_all_back(f"stopped: {self.ending.reason or 'error'}")
            self._queue.leave(self._worker)
        self._crew.close()
