"""The children of a worker at work: who gets a job, what their messages change, and who has to go."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hpo.queue import Job
from hpo.recording.trained import Trained
from hpo.worker import protocol
from hpo.worker.children import Child, Trainer
from hpo.worker.closings import Closings
from hpo.worker.collaborators import Collaborators
from hpo.worker.ending import STOP_GRACE, Ending
from hpo.worker.leases import Leases
from hpo.worker.processes import last_error
from hpo.worker.trials import Answers, Trials

START_ATTEMPTS = 3  # trainers in a row that may end before they are ready
BACKLOG = 2  # finished trials, beyond one a trainer, that may wait to be recorded when another one is begun
SLEPT = 5.0  # seconds; a longer turn of the loop means that the whole worker was stopped
LAST = (  # messages after which a trainer is free
    Trained,
    protocol.Returned,
    protocol.Diverged,
    protocol.TooLarge,
    protocol.Failed,
    protocol.OutOfMemory,
    protocol.DiskFull,
    protocol.DataDamaged,
)

log = logging.getLogger("hpo")


@dataclass
class _Alone:
    """A trial that needs its card or host for itself."""

    trainer: Trainer
    job: Job
    has_begun: bool = False


class Crew:
    """Trainers and suggester. Owned by the supervisor's thread."""

    def __init__(self, parts: Collaborators, leases: Leases, ending: Ending) -> None:
        self.trainers, self.device = parts.trainers, parts.device
        self.trials, self.closings = Trials(parts, leases), Closings(parts, leases)
        self._leases, self._ending, self._studies = leases, ending, parts.studies
        self._wait, self._clock, self._inbox = parts.wait, parts.clock, parts.inbox
        self._log_file, self._hang_timeout = parts.log_file, parts.settings.hang_timeout
        self._answers: Answers = self.trials.answers | dict.fromkeys(
            (protocol.Scored, protocol.NotScored), self.closings.on_scored
        )
        self._alone: dict[str | None, _Alone] = {}  # by card, None for the CPU
        # Trainers in a row that ended before their proof, by card, with the study that they were to prove.
        self._stillborn: Counter[tuple[str | None, str | None]] = Counter()
        self._left_since: dict[str, float] = {}  # by study that is being left, monotonic seconds
        self._last_turn = parts.clock.monotonic()

    def free_trainers(self) -> Iterator[Trainer]:
        """Start the trainers that are missing; yield those that are free."""
        self.trainers.start_missing()
        devices = self.trainers.devices - self._alone.keys()
        return (trainer for trainer in self.trainers if trainer.free and trainer.gpu in devices)

    def has_room(self) -> bool:
        """Return whether another trial may be begun: the disk takes it, and few finished ones wait to be recorded."""
        finished = sum(self.trainers.of(job) is None for job in self._leases.trials)
        return finished <= self.trainers.count + BACKLOG and self.trials.has_room()

    def begin(self, trainer: Trainer, job: Job) -> None:
        """Begin a claimed job on a free trainer, or let it wait there for the end of those beside it."""
        if self.trials.proofs.needs_place_alone(job):
            trainer.reserve(job, fetches=trainer.fetches)
            self._alone[trainer.gpu] = _Alone(trainer, job)
        else:
            self._start(trainer, job)

    def _start(self, trainer: Trainer, job: Job) -> None:
        (self.closings if job.kind == "closing" else self.trials).begin(trainer, job)

    def _children(self) -> list[Child]:
        return [*self.trainers, *([self.trials.suggester] if self.trials.suggester is not None else [])]

    # Their messages

    def listen(self, timeout: float) -> bool:
        """Wait for messages of children or recorder; act on those of the children; return whether one may be free."""
        children, is_news = self._children(), False
        ready = self._wait([*children, self._inbox], timeout)
        for child in children:
            if child not in ready:
                continue
            for message in child.receive():
                action = self._on_message if isinstance(child, Trainer) else self._on_point
                self._ending.attempt(action, child, message)
                is_news = is_news or not isinstance(message, protocol.EpochDone | protocol.Alive)
            if child.process.closed:
                self._ending.attempt(self._on_exit, child)
                is_news = True
        now = self._clock.monotonic()
        if now - self._last_turn > SLEPT:  # we were stopped as a whole: no child hung
            for child in self._children():
                child.last_sign = now
        self._last_turn = now
        return is_news

    def _on_message(self, trainer: Trainer, message: protocol.Message) -> None:
        if isinstance(message, protocol.Ready):
            trainer.ready = True
            return
        if trainer.proves:
            if not isinstance(message, protocol.Alive):
                self.trials.proofs.take(trainer, message)
                self._stillborn[trainer.gpu, None] = self._stillborn[trainer.gpu, trainer.study] = 0
            return
        answer, job = self._answers.get(type(message)), trainer.job
        if answer is None:
            trainer.process.kill(f"a trainer sent {type(message).__name__}")
            return
        if isinstance(message, LAST):
            trainer.release()
        if job is not None and job in self._leases:
            answer(trainer, job, message)

    def _on_point(self, _: Child, message: protocol.Message) -> None:
        self.trials.on_point(message)

    def _on_exit(self, child: Child) -> None:
        if not isinstance(child, Trainer):
            self.trials.on_suggester_exit(self._log_file)
            return
        reason = self.trainers.remove(child)
        is_leaving = child.job is not None and child.job.study in self._studies.leaving
        self.trials.on_exit(child, reason, is_ending=is_leaving or self._ending.reason is not None)
        if (child.proves or not child.proved) and child.gpu in self.trainers.devices:
            place = child.gpu, child.study
            self._stillborn[place] += 1
            if self._stillborn[place] >= START_ATTEMPTS:
                self._stillborn[place] = 0
                end = last_error(self._log_file)
                message = f"Trainers cannot be started: {reason}. The end of {self._log_file}:\n{end}"
                self.trials.proofs.fail(child.gpu, child.study, f"its {reason}", message)

    # Their end

    def look_after(self) -> None:
        """Ask for trials that the pruner ends; end children that hang; begin trials that are alone now."""
        limit = self._hang_timeout
        if self.trials.proofs.has_suspects and self._ending.reason is None:
            self.trainers.start_missing()
        self._ending.attempt(self.trials.proofs.look_after)
        self.trials.proofs.end_retired()
        if self._ending.reason is None:
            self._hand_back_left()
            self._begin_alone()
        for trainer in self.trainers:
            if trainer.trains and trainer.job is not None:
                study = self._studies[trainer.job.study]
                if study.pruning.reason(trainer.job):
                    trainer.ask_back()
            if trainer.hangs(limit):
                title = "the proof of a trainer" if trainer.job is None else trainer.job.title
                log.warning("%s: no progress for %.0f s", title, limit)
                trainer.process.kill(f"no progress for {limit:.0f} s")
        suggester = self.trials.suggester
        if suggester is not None and suggester.hangs(limit):
            suggester.process.kill(f"no progress for {limit:.0f} s")

    def _hand_back_left(self) -> None:
        """Return the jobs of studies that this worker is to leave, those that train from their newest epoch."""
        now, leaving = self._clock.monotonic(), self._studies.leaving
        self._left_since = {study: self._left_since.get(study, now) for study in leaving}
        for study, reason in leaving.items():
            self.trials.proofs.let_go(study, reason)
            is_late = now - self._left_since[study] > STOP_GRACE  # then without the epochs since the last checkpoint
            for job in self._leases.jobs:
                trainer = self.trainers.of(job)
                if job.study != study or trainer is None or self._leases.is_returning(job):
                    continue
                if trainer.trains and not is_late:
                    trainer.ask_back()
                else:
                    self.trials.stop(job)
                    self._leases.return_soon(job, reason)

    def _begin_alone(self) -> None:
        for gpu, alone in list(self._alone.items()):
            if not alone.trainer.has(alone.job) or alone.job not in self._leases:
                del self._alone[gpu]
            elif not alone.has_begun and not self.trainers.neighbours(alone.trainer):
                alone.has_begun = True
                self._start(alone.trainer, alone.job)

    def call_in(self) -> bool:
        """Ask busy trainers for their trials, once; kill those that take too long; return whether any is busy."""
        busy = [trainer for trainer in self.trainers if trainer.trains]
        for trainer in busy:
            if self._ending.grace_is_over:
                trainer.process.kill(f"stopped: {self._ending.reason}")
            else:
                trainer.ask_back()
        return bool(busy)

    def kill(self) -> None:
        for child in self._children():
            child.process.kill()

    def close(self) -> None:
        for child in self._children():
            child.process.close(timeout=0.5)
