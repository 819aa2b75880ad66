"""What a worker claims: for each free trainer a job of the first study that has one, until a limit is reached."""

import logging
from functools import partial

from hpo.errors import ServiceError
from hpo.queue import Job
from hpo.worker.children import Trainer
from hpo.worker.collaborators import Collaborators
from hpo.worker.crew import Crew
from hpo.worker.ending import Limits
from hpo.worker.leases import Leases

CLAIM_PAUSE = 1.0  # seconds between two looks into an empty queue
PAUSED = (
    "The study {study} is paused: {reason}. Nobody claims a trial of it. When the cause is gone, `hpo run` with the "
    "same options ends the pause; `hpo show` lists a trial's attempts."
)

log = logging.getLogger("hpo")


class Claims:
    """The claims of a worker. Owned by the supervisor's thread."""

    def __init__(self, worker: str, parts: Collaborators, leases: Leases, crew: Crew, limits: Limits) -> None:
        """`worker`: its name in the queue."""
        self.limits = limits
        self.claimed = 0  # trials
        self.pause: str | None = None  # why the one study is paused
        self.idle_since: float | None = None  # when the queue first had nothing for us
        self._worker, self._queue, self._recorder, self._studies = worker, parts.queue, parts.recorder, parts.studies
        self._lease, self._outage_limit = parts.settings.lease, parts.settings.outage_limit
        self._leases, self._crew = leases, crew
        self._next_claim = 0.0

    def soon(self) -> None:
        """Look for work at the next turn: a trainer may be free."""
        self._next_claim = 0.0

    def look(self, now: float) -> bool | None:
        """Claim what trainers are free for; return whether the study is closed if there is nothing left to do here."""
        if self._leases.jobs:
            self.idle_since = None
        elif self.limits.has_its_trials(self.claimed) or self._is_idle(now):
            return self._studies.look(now, self._leases.jobs)
        if now >= self._next_claim:
            if self._studies.look(now, self._leases.jobs):
                return True
            self._next_claim = now + CLAIM_PAUSE  # a trainer that gets free sets it back
            self._claim(now)
        return None

    def _is_idle(self, now: float) -> bool:
        limit, since = self.limits.idle, self.idle_since
        return limit is not None and since is not None and now - since > limit

    def _claim(self, now: float) -> None:
        """Give work to every free trainer, as far as there is some."""
        recorder = self._recorder
        is_away = recorder.outage.seconds > self._outage_limit or recorder.outage.store_full
        if is_away or not self._crew.has_room():
            self.idle_since = None
            return
        for trainer in self._crew.free_trainers():
            if self.limits.has_its_trials(self.claimed):
                return
            if not self._claim_for(trainer, now):
                return

    def _claim_for(self, trainer: Trainer, now: float) -> bool:
        """Claim a job for a free trainer, or let it prove its place first; return whether others may get one, too."""
        for served in self._studies.choices():
            study, proofs = served.row.name, self._crew.trials.proofs
            if not proofs.lets(trainer, study) or study not in proofs.stores or self._recorder.refuses(study):
                self.idle_since = None
                if trainer.proves or proofs.waits_alone(trainer, study):
                    break  # it begins nothing of a study that comes later
                continue
            job = self._queue.claim(
                study,
                worker=self._worker,
                device=trainer.place,
                lease=self._lease,
                stops=served.row.stops,
                created_at=served.row.created_at,
                take_over=self._recorder.may_expire,
            )
            if job is not None:
                self._begin(trainer, job)
                break
            if self._studies.name is not None:
                self._rest(study, now)
                return False
        else:
            if self._studies.name is None:
                self.idle_since = None if self._studies.are_opening else self.idle_since or now
        return True

    def _begin(self, trainer: Trainer, job: Job) -> None:
        self.pause = None
        self._leases.hold(job)
        self.claimed += job.kind == "trial"
        if job.attempt > 1 and job.verdict is None:
            log.warning("%s: %s, attempt %d", job.title, job.reason, job.attempt)
        self._studies.begun(job.study)
        self._crew.begin(trainer, job)

    def _rest(self, study: str, now: float) -> None:
        """Note that a worker of one study got nothing of it. Raise ServiceError if the worker is to leave."""
        if self._is_paused(study):
            return
        kept_off = not self._recorder.may_expire and self._queue.expired(study, lease=self._lease)
        self.idle_since = None if kept_off else self.idle_since or now

    def _is_paused(self, study: str) -> bool:
        """Return whether this worker waits for the end of a pause. Raise ServiceError if it is to leave."""
        reason = self._queue.pause(study) if not self._leases.jobs else None
        if reason is None:
            self.pause = None
            return False
        if self.pause is None:
            self.pause = reason
            log.warning("%s is paused: %s", study, reason)
            self._recorder.put(None, partial(self._studies[study].tasks.show_pause, reason))
        if not self.limits.stays:
            raise ServiceError(PAUSED.format(study=study, reason=reason.rstrip(".")))
        self.idle_since = None
        return True
