"""What the recorder reports to the supervisor: records that its threads post to an inbox."""

import os
import queue
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import ServiceError
from hpo.queue import AttemptOutcome, Job


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of the job is in the database, with its result if it has one."""

    job: Job
    logged: bool  # MLflow took its model


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The files that a trial goes on with or starts from are here."""

    job: Job
    checkpoint: Path | None
    start: Path | None  # folder of the model, or of the weights, that it starts from


@dataclass(frozen=True, kw_only=True)
class Winners:
    """The winners' models of a closing are here, every file checked."""

    job: Job


@dataclass(frozen=True, kw_only=True)
class HandedBack:
    """Everything of the job that comes before it returns to the queue is stored."""

    job: Job
    reason: str


@dataclass(frozen=True, kw_only=True)
class LostLease:
    job: Job


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The job's task failed."""

    job: Job
    reason: str
    attempt: AttemptOutcome
    disk_full: bool = False  # of this machine


@dataclass(frozen=True, kw_only=True)
class NothingRecorded:
    """No result can be recorded any more, whichever trial of the study it is of: the worker should leave it."""

    study: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DataFetched:
    study: str
    path: Path  # of the data set


@dataclass(frozen=True, kw_only=True)
class NoData:
    study: str
    error: ServiceError


@dataclass(frozen=True, kw_only=True)
class StoreProved:
    """The artifact store takes and returns files of this worker."""

    study: str
    refused: Refused | None = None  # the failure after which it was asked


@dataclass(frozen=True, kw_only=True)
class NoStore:
    """This worker cannot use the artifact store, though its server answers."""

    study: str
    error: ServiceError
    refused: Refused | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The worker has what a study of the pool needs, or an error says what is missing."""

    study: str
    error: str | None = None


Outcome = (
    Ended
    | Fetched
    | Winners
    | HandedBack
    | LostLease
    | Refused
    | NothingRecorded
    | DataFetched
    | NoData
    | StoreProved
    | NoStore
    | Opened
)


class Inbox:
    """Outcomes on their way from the recorder's threads to the supervisor's; readable (`fileno`) when there are any."""

    def __init__(self) -> None:
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def post(self, outcome: Outcome) -> None:
        self._outcomes.put(outcome)
        with suppress(OSError):  # full: it is readable anyway; closed: nobody listens any more
            os.write(self._write, b"!")

    @property
    def empty(self) -> bool:
        return self._outcomes.empty()

    def take(self) -> list[Outcome]:
        """Return what has been posted."""
        with suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass
        outcomes = []
        with suppress(queue.Empty):
            while True:
                outcomes.append(self._outcomes.get_nowait())
        return outcomes

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)
