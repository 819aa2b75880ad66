"""What becomes of the trials that a worker holds: a table of answers to what trainers, suggester and recorder say.

Owned by the supervisor's thread. A message or outcome on a job that is held no longer changes nothing.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpo import crash
from hpo.errors import ServiceError
from hpo.queue import AttemptOutcome, Job, State
from hpo.recording import outcomes
from hpo.recording.tasks import Tasks
from hpo.recording.trained import Trained
from hpo.study.objectives import NOT_TRAINED
from hpo.worker import protocol
from hpo.worker.children import Suggester, Trainer
from hpo.worker.collaborators import Collaborators
from hpo.worker.leases import Leases
from hpo.worker.proofs import Proofs

START_ATTEMPTS = 3  # suggesters in a row that may end before they have chosen a point

log = logging.getLogger("hpo")

Answers = dict[type[protocol.Message], Callable[[Trainer, Job, Any], None]]  # to a trainer, on a job that is held


class Trials:
    """Begins trials and acts on what is said of them. Raises ServiceError where the worker can do nothing more."""

    def __init__(self, parts: Collaborators, leases: Leases) -> None:
        self._leases, self._recorder, self._studies = leases, parts.recorder, parts.studies
        self._trainers, self._start_suggester = parts.trainers, parts.start_suggester
        self._folder, self._settings, self._device = parts.folder, parts.settings, parts.device
        self.suggester: Suggester | None = None
        self._pointless = 0  # suggesters in a row that ended before they had chosen a point
        self._disk_full = False  # found so by a trainer or the recorder
        self.proofs = Proofs(parts, leases, self._wait_for_data)
        self.answers: Answers = {
            protocol.Started: self._on_started,
            protocol.Alive: lambda *_: None,  # that something came is all that counts
            protocol.EpochDone: self._on_epoch,
            protocol.CheckpointWritten: self._on_checkpoint,
            Trained: self._on_trained,
            protocol.Returned: self._on_returned,
            protocol.Diverged: self._on_diverged,
            protocol.TooLarge: lambda _, job, message: self._end(
                job, State.PRUNED, 0, f"{NOT_TRAINED}: {message.reason}"
            ),
            protocol.Failed: self._on_failed,
            protocol.OutOfMemory: self._on_out_of_memory,
            protocol.DiskFull: lambda _, job, message: self._wait_for_room(job, message.reason),
            protocol.DataDamaged: self._on_data_damaged,
        }

    def has_room(self) -> bool:
        """Return whether the disk takes another trial; it is looked at only after it was found full."""
        self._disk_full = self._disk_full and self._folder.lacks_room()
        return not self._disk_full

    def begin(self, trainer: Trainer, job: Job) -> None:
        """Begin a claimed trial on a free trainer."""
        tasks, data = self._tasks(job), self._studies[job.study].data
        if job.verdict is not None:
            log.info("%s was %s", job.title, job.verdict)
            self._recorder.put(job, partial(tasks.end, job, State.PRUNED, epoch=job.epochs, reason=job.verdict))
            return
        if (trained := self._trained(job)) is not None:
            log.info("%s was trained by a worker that has ended: its result is recorded", job.title)
            self._record(job, trained)
            return
        trainer.reserve(job, fetches=data.fetches)
        if job.spec is None:  # a slot: choosing its point takes longer with every trial, so another process does it
            self.suggester = self.suggester or self._start_suggester()
            self.suggester.ask(trainer, job)
            return
        point = " ".join(f"{key}={value}" for key, value in job.spec.point.items())
        log.info("%s claimed: %s", job.title, point)
        crash.at("claimed")
        if job.checkpoint is None and not job.spec.begins_with_files:
            self._train(trainer, outcomes.Fetched(job=job, checkpoint=None, start=None))
        else:
            self._recorder.put(job, partial(tasks.fetch, job, self._folder.of(job)))
        self._recorder.put(job, partial(tasks.reconcile, job))

    def _tasks(self, job: Job) -> Tasks:
        return self._studies[job.study].tasks

    def _trained(self, job: Job) -> Trained | None:
        """Return what an earlier worker of this home has trained of the job, if it is whole."""
        with suppress(protocol.ProtocolError):  # of another version of hpo
            message = protocol.decode(job.trained) if job.trained is not None else None
            return self._folder.adopt(job, message) if isinstance(message, Trained) else None
        return None

    def _train(self, trainer: Trainer, files: outcomes.Fetched) -> None:
        data = self._studies[files.job.study].data
        data.touch()
        assert files.job.spec is not None
        trainer.send(
            protocol.Train(
                spec=files.job.spec,
                data=data.path,
                checkpoint=files.checkpoint,
                start=files.start,
                folder=self._folder.of(files.job),
                cache=self._settings.home / "cache" / "features",
                device=self._device,
                checkpoint_interval=self._settings.checkpoint_interval,
            )
        )

    # Messages of trainers

    def _on_started(self, trainer: Trainer, job: Job, message: protocol.Started) -> None:
        self._studies[job.study].data.is_sound()
        if message.epoch:
            log.info("%s goes on after epoch %d", job.title, message.epoch)

    def _on_epoch(self, trainer: Trainer, job: Job, message: protocol.EpochDone) -> None:
        self._leases.put_epoch(job, (message.number, message.at, message.metrics))

    def _on_checkpoint(self, trainer: Trainer, job: Job, message: protocol.CheckpointWritten) -> None:
        # A committed checkpoint never runs ahead of the stored curve.
        task = partial(self._tasks(job).store_checkpoint, job, message.path, epoch=message.epoch, sha256=message.sha256)
        self._leases.put_task(job, task)

    def _on_trained(self, trainer: Trainer, job: Job, message: Trained) -> None:
        crash.at("trained")
        self._record(job, message)

    def _record(self, job: Job, trained: Trained) -> None:
        record, bury = partial(self._tasks(job).record, job, trained), partial(self._tasks(job).bury, job)
        self._leases.put_task(job, record, bury, trained=protocol.encode(trained).decode())

    def _on_returned(self, trainer: Trainer, job: Job, message: protocol.Returned) -> None:
        if reason := self._studies[job.study].pruning.reason(job):
            log.info("%s pruned after epoch %d", job.title, message.epoch)
            self._end(job, State.PRUNED, message.epoch, reason)
        else:
            log.info("giving %s back after epoch %d", job.title, message.epoch)
            self._leases.put_task(job, partial(self._tasks(job).hand_back, job, "handed back"))

    def _on_diverged(self, trainer: Trainer, job: Job, message: protocol.Diverged) -> None:
        log.warning("%s diverged at epoch %d", job.title, message.epoch)
        self._end(job, State.DIVERGED, message.epoch, f"diverged at epoch {message.epoch}")

    def _end(self, job: Job, state: State, epoch: int, reason: str) -> None:
        self._leases.put_task(job, partial(self._tasks(job).end, job, state, epoch=epoch, reason=reason))

    def _on_failed(self, trainer: Trainer, job: Job, message: protocol.Failed) -> None:
        if self._folder.lacks_room():  # of a .pt2 file that it cannot finish torch says something else, and aborts
            self._wait_for_room(job, f"no room on the disk ({message.reason})")
        else:
            self.proofs.suspect(trainer, job, message.reason, AttemptOutcome.FAILED)

    def _on_out_of_memory(self, trainer: Trainer, job: Job, message: protocol.OutOfMemory) -> None:
        self.proofs.suspect(trainer, job, message.reason, AttemptOutcome.OUT_OF_MEMORY)

    def _wait_for_room(self, job: Job, reason: str) -> None:
        log.warning("%s waits: %s", job.title, reason)
        self._disk_full = True
        self._leases.put_task(job, partial(self._tasks(job).hand_back, job, reason))

    def _on_data_damaged(self, trainer: Trainer, job: Job, message: protocol.DataDamaged) -> None:
        """Fetch the data set again: its damaged file is no trial's fault."""
        log.warning("%s waits: %s", job.title, message.reason)
        if trainer.fetches != self._studies[job.study].data.fetches:  # it may have met the file before the last fetch
            self._leases.return_soon(job, message.reason)
        else:
            self._wait_for_data(job.study, job, message.reason)

    def _wait_for_data(self, study: str, job: Job | None, reason: str) -> None:
        """Let a job, or the proof of a trainer, wait until the study's data set is fetched again."""
        served = self._studies[study]
        try:
            if served.data.wait(job, reason):
                self._recorder.put(None, served.tasks.fetch_data)
        except ServiceError as error:
            self.on_data(outcomes.NoData(study=study, error=error))

    def on_exit(self, trainer: Trainer, reason: str, *, is_ending: bool) -> None:
        """Return the trial of a trainer that has ended; `is_ending`: the worker ends, too."""
        job = trainer.job
        if job is None or job not in self._leases:
            return
        if trainer.process.killed is None and self._folder.lacks_room():
            self._wait_for_room(job, f"no room on the disk ({reason})")
        elif is_ending:
            log.warning("%s: handed back without its newest epochs: %s", job.title, reason)
            self._leases.return_soon(job, reason)
        else:
            outcome = AttemptOutcome.OUT_OF_MEMORY if trainer.process.lacked_memory else AttemptOutcome.FAILED
            self.proofs.suspect(trainer, job, reason, outcome)

    # The suggester

    def on_point(self, message: protocol.Message) -> None:
        """Begin the trial whose point was chosen, or return its job."""
        assert self.suggester is not None
        if isinstance(message, protocol.Ready):
            return
        if not isinstance(message, protocol.Answer):
            self.suggester.process.kill(f"a suggester sent {type(message).__name__}")
            return
        if (waiting := self.suggester.take(message.job, message.fence)) is None:
            return
        trainer, job = waiting
        self._pointless = 0
        if job not in self._leases:
            return
        if isinstance(message, protocol.Filled):
            job = replace(job, spec=message.spec, cost=message.cost)
            self._leases.hold(job)
            self.begin(trainer, job)
        elif isinstance(message, protocol.ClaimLost):
            self.lose(job, "lost its lease")
        elif isinstance(message, protocol.DatabaseAway):
            self._leases.return_soon(job, "the sampler could not reach the database")
        else:
            self._leases.return_soon(job, message.reason, AttemptOutcome.FAILED)

    def on_suggester_exit(self, log_file: Path) -> None:
        """Let its jobs wait again, and count no attempt: they have not come to a training."""
        assert self.suggester is not None
        ended, self.suggester = self.suggester, None
        reason = ended.process.obituary()
        ended.process.close()
        for trainer, job in ended.waiting.values():
            if trainer.has(job):
                trainer.release()
            self._leases.return_soon(job, reason)
        log.warning("%s; another one is started when it is needed", reason)
        self._pointless += 1
        if self._pointless >= START_ATTEMPTS:
            for study in {job.study for _, job in ended.waiting.values()}:
                self._studies.fail(study, f"No point can be chosen: {reason}. Its log: {log_file}")

    # Outcomes of the recorder

    def on_fetched(self, outcome: outcomes.Fetched) -> None:
        trainer = self._trainers.of(outcome.job)
        if trainer is not None and outcome.job in self._leases:
            self._train(trainer, outcome)

    def on_data(self, outcome: outcomes.DataFetched | outcomes.NoData) -> None:
        if isinstance(outcome, outcomes.DataFetched):
            self._studies[outcome.study].data.fetched(outcome.path)
        for job, reason in self._studies[outcome.study].data.take_waiting():
            self._leases.return_soon(job, reason)
        if isinstance(outcome, outcomes.NoData):
            self._studies.fail(outcome.study, str(outcome.error))

    def on_refused(self, outcome: outcomes.Refused) -> None:
        """Return a job whose task failed, once it is known whether it is the place's fault; stop its trainer."""
        self._disk_full = self._disk_full or outcome.disk_full
        self.stop(outcome.job)
        if outcome.attempt is AttemptOutcome.FAILED:
            self.proofs.begin_store(outcome.job.study, outcome)
        else:
            self._leases.return_soon(outcome.job, outcome.reason, outcome.attempt)

    def lose(self, job: Job, reason: str) -> None:
        """Stop a job whose row is held by another worker, or cancelled; write nothing more of it."""
        log.warning("%s: %s, stopping", job.title, reason)
        self._leases.drop(job)
        self.stop(job)

    def stop(self, job: Job) -> None:
        """Let nobody here work on a job any more."""
        if self.suggester is not None and self.suggester.take(job.id, job.fence):
            return
        if (trainer := self._trainers.of(job)) is None:  # while it is recorded
            return
        if trainer.request is not None:
            trainer.process.kill(f"{job.title} is over here")
        trainer.release()
