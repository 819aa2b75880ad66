"""What a worker serves: a study with everything that its trials need here, and the worker of one study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hpo.closing.steps import Closing
from hpo.errors import NotFound, ServiceError
from hpo.queue import ENDED, Job, Queue, StudyRow
from hpo.recording.tasks import Tasks
from hpo.search.pruning import Pruning
from hpo.study.records import TrialSpec
from hpo.worker.data_file import DataFile


@dataclass(frozen=True, kw_only=True)
class Served:
    """A study that a worker serves."""

    row: StudyRow
    tasks: Tasks  # for the recorder
    pruning: Pruning
    start_closing: Callable[[Job, Path, Path], Closing]  # of a claimed job, with its folder and the data set's file
    data: DataFile
    proof: TrialSpec  # the smallest network of the study, which shows whether a place can train


class Studies(Protocol):
    """What a supervisor asks of OneStudy and of `hpo.worker.pool.Pool`. Both are owned by its thread."""

    name: str | None  # of the one study; None for a pool

    def __getitem__(self, study: str) -> Served: ...

    @property
    def active(self) -> Sequence[Served]:
        """The studies whose trials are held or claimed here."""

    def look(self, now: float, held: Sequence[Job]) -> bool:
        """Learn what is to be done; return whether that is nothing any more. `now` in monotonic seconds."""

    def choices(self) -> Sequence[Served]:
        """Return the studies to claim a job of, in this order."""

    @property
    def are_opening(self) -> bool:
        """Whether one is being prepared."""

    def begun(self, study: str) -> None:
        """Note that a trainer has got work of a study."""

    def recorded(self, study: str) -> None:
        """Note that a trial of a study has ended here in peace."""

    def fail(self, study: str, message: str) -> None:
        """Work on a study no more: raise ServiceError with the message, or leave the study to other workers."""

    def stop(self, study: str, reason: str) -> bool:
        """Note that a study is to be worked on no more here; return whether the worker goes on with others."""

    @property
    def leaving(self) -> Mapping[str, str]:
        """The studies whose jobs are to be handed back, with the reasons."""

    def on_opened(self, study: str, error: str | None) -> None:
        """Note that the preparation for a study has ended."""


class OneStudy:
    """The one study of a worker."""

    are_opening = False

    def __init__(self, queue: Queue, served: Served) -> None:
        self._queue, self._served = queue, served
        self.name: str | None = served.row.name
        self.active: Sequence[Served] = (served,)

    def __getitem__(self, study: str) -> Served:
        return self._served

    def look(self, now: float, held: Sequence[Job]) -> bool:
        state = self._queue.closing_state(self._served.row.name)
        if state is None:
            raise NotFound(f"The study {self.name} was deleted meanwhile.")
        return state in ENDED

    def choices(self) -> Sequence[Served]:
        return self.active

    def begun(self, study: str) -> None: ...

    def recorded(self, study: str) -> None: ...

    def fail(self, study: str, message: str) -> None:
        raise ServiceError(message)

    def stop(self, study: str, reason: str) -> bool:
        return False

    @property
    def leaving(self) -> Mapping[str, str]:
        return {}

    def on_opened(self, study: str, error: str | None) -> None: ...
