"""Whose fault a failure is: a trainer proves its place before it gets a job, and a fresh one after each failure.

Owned by the supervisor's thread. A place is a card, or the CPU, of this host. Jobs that failed there are held as
suspects: if the place is sound, it was their own fault.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hpo.errors import ServiceError
from hpo.queue import AttemptOutcome, Job
from hpo.recording import outcomes
from hpo.worker import protocol
from hpo.worker.children import Trainer
from hpo.worker.collaborators import Collaborators
from hpo.worker.leases import Leases
from hpo.worker.work_folder import ROOM

log = logging.getLogger("hpo")


@dataclass(frozen=True)
class _Suspect:
    """A job that failed."""

    job: Job
    reason: str
    outcome: AttemptOutcome
    alone: bool  # it had its card or host for itself
    gpu: str | None


class Proofs:
    """The proofs of a worker's trainers, and the jobs that wait for them."""

    def __init__(
        self, parts: Collaborators, leases: Leases, wait_for_data: Callable[[str, Job | None, str], None]
    ) -> None:
        """`wait_for_data` lets the data set of a study be fetched again."""
        self._studies, self._device, self._log_file = parts.studies, parts.device, parts.log_file
        self._folder, self._trainers = parts.folder, parts.trainers
        self._leases, self._wait_for_data = leases, wait_for_data
        self._recorder = parts.recorder
        self.stores: set[str] = set()  # studies of which the artifact store has taken and returned a file
        self._suspects: list[_Suspect] = []
        self._large: set[int] = set()  # jobs that lacked memory beside others
        # Trainers to be asked again, with the study, when this is true.
        self._again: dict[tuple[Trainer, str], Callable[[], bool]] = {}
        self._crowded: set[tuple[Trainer, str]] = set()  # of these, those that lacked memory beside others
        self._has_worked = False  # a trainer has proved its place
        self.failed: dict[str, str] = {}  # why each GPU trains no more, though others do
        self._unfit: dict[str, set[str | None]] = {}  # of each study of a pool: GPUs that cannot train it

    # The proof of a trainer

    def lets(self, trainer: Trainer, study: str) -> bool:
        """Return whether a free trainer may get a job of a study; if it has yet to prove that, ask it."""
        if trainer.gpu in self._unfit.get(study, ()) or (trainer, study) in self._again:
            return False
        if study not in trainer.proved:
            self.begin(trainer, study)
        return study in trainer.proved

    def waits_alone(self, trainer: Trainer, study: str) -> bool:
        """Return whether a trainer waits for the end of those beside it, to prove that it can train a study then."""
        return (trainer, study) in self._crowded

    def begin(self, trainer: Trainer, study: str) -> None:
        """Ask a trainer for its proof."""
        trainer.study, served = study, self._studies[study]
        if self._folder.lacks_room():
            self._lacks_room(
                trainer, study, f"no room on the disk: less than {ROOM / 2**20:.0f} MB in {self._folder.path}"
            )
            return
        trainer.fetches = served.data.fetches
        folder = self._folder.path / f"proof-{id(trainer):x}"
        trainer.send(protocol.Prove(spec=served.proof, data=served.data.path, folder=folder, device=self._device))

    def take(self, trainer: Trainer, message: protocol.Message) -> None:
        """Act on an answer to Prove. Raise ServiceError if this place cannot train."""
        trainer.release()
        assert trainer.study is not None
        study, data = trainer.study, self._studies[trainer.study].data
        if isinstance(message, protocol.Proved):
            self._has_worked = True
            trainer.proved.add(study)
            data.is_sound()
            self._clear(trainer.gpu, study)
        elif isinstance(message, protocol.DataDamaged):
            self._again[trainer, study] = lambda: not data.waiting
            if trainer.fetches == data.fetches:  # else it has met the file before the last fetch
                log.warning("%s", message.reason)
                self._wait_for_data(study, None, message.reason)
        elif isinstance(message, protocol.DiskFull):
            self._lacks_room(trainer, study, message.reason)
        elif isinstance(message, protocol.OutOfMemory) and self._trainers.neighbours(trainer):
            self._clear(trainer.gpu, study)  # others train there
            self._again[trainer, study] = lambda: not self._trainers.neighbours(trainer)
            self._crowded.add((trainer, study))
        else:
            self._cannot_train(trainer, study, getattr(message, "reason", type(message).__name__))

    def _lacks_room(self, trainer: Trainer, study: str, reason: str) -> None:
        if not self._has_worked:
            self._cannot_train(trainer, study, reason)
        self._again[trainer, study] = lambda: not self._folder.lacks_room()

    def look_after(self) -> None:
        """Ask the trainers again that can prove more now."""
        for (trainer, study), is_due in list(self._again.items()):
            is_over = trainer.process.closed or not trainer.ready
            if is_over or is_due():
                del self._again[trainer, study]
                self._crowded.discard((trainer, study))
                if not is_over and trainer.free:
                    self.begin(trainer, study)
        for suspect in self._suspects:
            self._look_into(suspect)

    def _look_into(self, suspect: _Suspect) -> None:
        """Let a fresh trainer prove the place of a job that failed, unless one does."""
        study, beside = suspect.job.study, [trainer for trainer in self._trainers if trainer.gpu == suspect.gpu]
        fresh = [trainer for trainer in beside if trainer.free and study not in trainer.proved]
        if fresh and not any(trainer.proves and trainer.study == study for trainer in beside):
            self.lets(fresh[0], study)

    def _cannot_train(self, trainer: Trainer, study: str, reason: str) -> None:
        hint = " `--device auto` takes the CPU where there is no GPU." if self._device == "cuda" else ""
        self.fail(
            trainer.gpu,
            study,
            reason,
            f"This worker cannot train here: expected to train a small batch on the device '{self._device}', found: "
            f"{reason.rstrip('.')}. It takes no trial; what it held is given back, and no attempt counts.{hint} "
            f"Its log: {self._log_file}",
        )

    def fail(self, gpu: str | None, study: str | None, reason: str, message: str) -> None:
        """Train no more on a device; return its suspects, uncounted.

        Raise ServiceError with the message if it is the only one. A pool leaves the study to others instead.
        """
        for suspect in self._take(gpu, study):
            self._leases.return_soon(suspect.job, suspect.reason, AttemptOutcome.PLACE_FAILED)
        if study is not None and self._studies.name is None:
            self._unfit.setdefault(study, set()).add(gpu)
            if self._trainers.devices <= self._unfit[study]:
                del self._unfit[study]  # all of them are asked again when the study is tried again
                self._studies.fail(study, message)
            else:
                log.warning("GPU %s trains nothing of %s, the other devices do: %s", gpu, study, reason)
            return
        if gpu is None or self._trainers.devices <= {gpu}:
            raise ServiceError(message)
        self.failed[gpu] = reason
        log.warning("GPU %s trains no more, the other devices go on: %s (log: %s)", gpu, reason, self._log_file)
        self._trainers.retire(gpu)
        for trainer in self._trainers:
            if trainer.gpu == gpu and trainer.job is not None and not trainer.trains:
                self._leases.return_soon(trainer.job, reason)
                trainer.release()

    def end_retired(self) -> None:
        """End the trainers on GPUs that failed; those that train hand back first."""
        for trainer in self._trainers:
            if trainer.gpu not in self.failed:
                continue
            if trainer.trains:
                trainer.ask_back()
            elif trainer.process.killed is None:
                trainer.process.kill(f"GPU {trainer.gpu} trains no more")

    # The proof of the artifact store

    def begin_store(self, study: str, refused: outcomes.Refused | None = None) -> None:
        """Let the recorder show that files of a study can be stored; until then nothing of it is claimed.

        `refused`: a failure to store one.
        """
        self.stores.discard(study)
        self._recorder.put(None, partial(self._studies[study].tasks.prove_store, refused))

    def on_store(self, outcome: outcomes.StoreProved | outcomes.NoStore) -> None:
        """Return the job that waited for this. A worker that cannot use the store trains no more of the study."""
        has_store = isinstance(outcome, outcomes.StoreProved)
        if has_store:
            self.stores.add(outcome.study)
        if outcome.refused is not None:
            ended = AttemptOutcome.FAILED if has_store else AttemptOutcome.PLACE_FAILED
            self._leases.return_soon(outcome.refused.job, outcome.refused.reason, ended)
        if isinstance(outcome, outcomes.NoStore):
            self._studies.fail(outcome.study, str(outcome.error))

    # Jobs that failed

    def suspect(self, trainer: Trainer, job: Job, reason: str, outcome: AttemptOutcome) -> None:
        """Hold a job that failed until a fresh trainer has proved its place."""
        log.warning("%s failed in attempt %d: %s", job.title, job.attempt, reason)
        if trainer.gpu in self.failed or trainer.gpu in self._unfit.get(job.study, ()):
            self._leases.return_soon(job, reason, AttemptOutcome.PLACE_FAILED)
            return
        alone = not self._trainers.neighbours(trainer)
        self._suspects.append(_Suspect(job, reason, outcome, alone, trainer.gpu))
        trainer.process.kill("a fresh trainer takes over after a failure")

    def let_go(self, study: str, reason: str) -> None:
        """Return the suspects of a study that this worker leaves."""
        for suspect in [suspect for suspect in self._suspects if suspect.job.study == study]:
            self._suspects.remove(suspect)
            self._leases.return_soon(suspect.job, reason)

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def needs_place_alone(self, job: Job) -> bool:
        """Return whether the job lacked memory here while others trained beside it."""
        return job.id in self._large

    def _clear(self, gpu: str | None, study: str) -> None:
        """Return the suspects of a sound place: it was their own fault."""
        for suspect in self._take(gpu, study):
            if suspect.outcome is AttemptOutcome.OUT_OF_MEMORY and not suspect.alone:
                self._large.add(suspect.job.id)
            self._leases.return_soon(suspect.job, suspect.reason, suspect.outcome, alone=suspect.alone)

    def _take(self, gpu: str | None, study: str | None) -> list[_Suspect]:
        """Return the suspects of a device, of all studies without `study`, and hold them no longer."""
        taken = [suspect for suspect in self._suspects if suspect.gpu == gpu and study in (None, suspect.job.study)]
        self._suspects = [suspect for suspect in self._suspects if suspect not in taken]
        return taken
