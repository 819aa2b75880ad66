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

    def __init__(self, parts: Collaborators, leases: Leases, wait_for_data: Callable[[Job | None, str], None]) -> None:
        """`wait_for_data` lets the data set be fetched again."""
        self._spec, self._device, self._log_file = parts.proof, parts.device, parts.log_file
        self._data, self._folder, self._trainers = parts.data, parts.folder, parts.trainers
        self._leases, self._wait_for_data = leases, wait_for_data
        self._recorder, self._tasks = parts.recorder, parts.tasks
        self.has_store = False  # the artifact store has taken and returned a file
        self._suspects: list[_Suspect] = []
        self._large: set[int] = set()  # jobs that lacked memory beside others
        self._again: dict[Trainer, Callable[[], bool]] = {}  # trainers to be asked again, when this is true
        self._has_worked = False  # a trainer has proved its place
        self.failed: dict[str, str] = {}  # why each GPU trains no more, though others do

    # The proof of a trainer

    def begin(self, trainer: Trainer) -> None:
        """Ask a trainer for its proof."""
        if self._folder.lacks_room():
            self._lacks_room(trainer, f"no room on the disk: less than {ROOM / 2**20:.0f} MB in {self._folder.path}")
            return
        trainer.fetches = self._data.fetches
        folder = self._folder.path / f"proof-{id(trainer):x}"
        trainer.send(protocol.Prove(spec=self._spec, data=self._data.path, folder=folder, device=self._device))

    def take(self, trainer: Trainer, message: protocol.Message) -> None:
        """Act on an answer to Prove. Raise ServiceError if this place cannot train."""
        trainer.release()
        if isinstance(message, protocol.Proved):
            trainer.proved = self._has_worked = True
            self._data.is_sound()
            self._clear(trainer.gpu)
        elif isinstance(message, protocol.DataDamaged):
            self._again[trainer] = lambda: not self._data.waiting
            if trainer.fetches == self._data.fetches:  # else it has met the file before the last fetch
                log.warning("%s", message.reason)
                self._wait_for_data(None, message.reason)
        elif isinstance(message, protocol.DiskFull):
            self._lacks_room(trainer, message.reason)
        elif isinstance(message, protocol.OutOfMemory) and self._trainers.neighbours(trainer):
            self._clear(trainer.gpu)  # others train there
            self._again[trainer] = lambda: not self._trainers.neighbours(trainer)
        else:
            self._cannot_train(trainer, getattr(message, "reason", type(message).__name__))

    def _lacks_room(self, trainer: Trainer, reason: str) -> None:
        if not self._has_worked:
            self._cannot_train(trainer, reason)
        self._again[trainer] = lambda: not self._folder.lacks_room()

    def look_after(self) -> None:
        """Ask the trainers again that can prove more now."""
        for trainer, is_due in list(self._again.items()):
            if trainer.process.closed:
                del self._again[trainer]
            elif is_due():
                del self._again[trainer]
                self.begin(trainer)

    def _cannot_train(self, trainer: Trainer, reason: str) -> None:
        hint = " `--device auto` takes the CPU where there is no GPU." if self._device == "cuda" else ""
        self.fail(
            trainer.gpu,
            reason,
            f"This worker cannot train here: expected to train a small batch on the device '{self._device}', found: "
            f"{reason.rstrip('.')}. It takes no trial; what it held is given back, and no attempt counts.{hint} "
            f"Its log: {self._log_file}",
        )

    def fail(self, gpu: str | None, reason: str, message: str) -> None:
        """Train no more on a device; return its suspects, uncounted.

        Raise ServiceError with the message if it is the only one.
        """
        for suspect in self._take(gpu):
            self._leases.return_soon(suspect.job, suspect.reason, AttemptOutcome.PLACE_FAILED)
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

    def begin_store(self, refused: outcomes.Refused | None = None) -> None:
        """Let the recorder show that files can be stored; until then nothing is claimed. `refused`: a failure of it."""
        self.has_store = False
        self._recorder.put(None, partial(self._tasks.prove_store, refused))

    def on_store(self, outcome: outcomes.StoreProved | outcomes.NoStore) -> None:
        """Return the job that waited for this. Raise ServiceError if this worker cannot use the store."""
        self.has_store = isinstance(outcome, outcomes.StoreProved)
        if outcome.refused is not None:
            ended = AttemptOutcome.FAILED if self.has_store else AttemptOutcome.PLACE_FAILED
            self._leases.return_soon(outcome.refused.job, outcome.refused.reason, ended)
        if isinstance(outcome, outcomes.NoStore):
            raise outcome.error

    # Jobs that failed

    def suspect(self, trainer: Trainer, job: Job, reason: str, outcome: AttemptOutcome) -> None:
        """Hold a job that failed until a fresh trainer has proved its place."""
        log.warning("%s failed in attempt %d: %s", job.title, job.attempt, reason)
        if trainer.gpu in self.failed:
            self._leases.return_soon(job, reason, AttemptOutcome.PLACE_FAILED)
            return
        alone = not self._trainers.neighbours(trainer)
        self._suspects.append(_Suspect(job, reason, outcome, alone, trainer.gpu))
        trainer.process.kill("a fresh trainer takes over after a failure")

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    def needs_place_alone(self, job: Job) -> bool:
        """Return whether the job lacked memory here while others trained beside it."""
        return job.id in self._large

    def _clear(self, gpu: str | None) -> None:
        """Return the suspects of a sound place: it was their own fault."""
        for suspect in self._take(gpu):
            if suspect.outcome is AttemptOutcome.OUT_OF_MEMORY and not suspect.alone:
                self._large.add(suspect.job.id)
            self._leases.return_soon(suspect.job, suspect.reason, suspect.outcome, alone=suspect.alone)

    def _take(self, gpu: str | None) -> list[_Suspect]:
        taken = [suspect for suspect in self._suspects if suspect.gpu == gpu]
        self._suspects = [suspect for suspect in self._suspects if suspect.gpu != gpu]
        return taken
